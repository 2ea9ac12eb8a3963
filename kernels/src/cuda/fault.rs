//! What the driver's errors mean to whoever runs the worker: the name that documentation and forums know, and what to do.

use crate::Error;
use cudarc::driver::{DriverError, sys::CUresult};

/// An error that ends the worker.
pub(crate) fn device(error: DriverError) -> Error {
    Error::Device(text(error))
}

/// The error's name and what to do about it.
pub(crate) fn text(DriverError(code): DriverError) -> String {
    match advice(code) {
        Some(advice) => format!("{code:?}: {advice}"),
        None => format!("{code:?}"),
    }
}

fn advice(code: CUresult) -> Option<&'static str> {
    use CUresult::*;
    Some(match code {
        CUDA_ERROR_ILLEGAL_ADDRESS
        | CUDA_ERROR_MISALIGNED_ADDRESS
        | CUDA_ERROR_ILLEGAL_INSTRUCTION
        | CUDA_ERROR_INVALID_PC
        | CUDA_ERROR_HARDWARE_STACK_ERROR
        | CUDA_ERROR_ASSERT
        | CUDA_ERROR_LAUNCH_FAILED => {
            "a kernel launched earlier failed, and the GPU's state is lost with it; started with CUDA_LAUNCH_BLOCKING=1, \
             the worker names the kernel when it happens again"
        }
        CUDA_ERROR_LAUNCH_TIMEOUT => {
            "a kernel ran for too long; the GPU must not be one that drives a display"
        }
        CUDA_ERROR_ECC_UNCORRECTABLE
        | CUDA_ERROR_CONTAINED
        | CUDA_ERROR_NVLINK_UNCORRECTABLE
        | CUDA_ERROR_DEVICE_UNAVAILABLE => {
            "the GPU is faulty or taken; see nvidia-smi -q -d ECC and dmesg (Xid), and take it out of service or reset it"
        }
        CUDA_ERROR_OUT_OF_MEMORY => "the GPU's memory is full",
        CUDA_ERROR_NO_DEVICE | CUDA_ERROR_INVALID_DEVICE => {
            "no such GPU is visible; compare nvidia-smi -L, CUDA_VISIBLE_DEVICES and, in a container, --gpus or the pod's \
             nvidia.com/gpu"
        }
        CUDA_ERROR_NO_BINARY_FOR_GPU
        | CUDA_ERROR_INVALID_IMAGE
        | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
        | CUDA_ERROR_SYSTEM_DRIVER_MISMATCH
        | CUDA_ERROR_COMPAT_NOT_SUPPORTED_ON_DEVICE => {
            "the driver is older than the kernels in this binary; install one for CUDA 13 (580 or later)"
        }
        CUDA_ERROR_NOT_INITIALIZED | CUDA_ERROR_SYSTEM_NOT_READY => {
            "the driver is not running; see nvidia-smi, and on an NVSwitch machine the fabric manager"
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_is_told_what_to_do() {
        for (code, name, part) in [
            (CUresult::CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_LAUNCH_BLOCKING=1"),
            (CUresult::CUDA_ERROR_ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE", "nvidia-smi -q -d ECC"),
            (CUresult::CUDA_ERROR_NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "CUDA_VISIBLE_DEVICES"),
            (CUresult::CUDA_ERROR_INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "580 or later"),
            (CUresult::CUDA_ERROR_NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", ""),
        ] {
            let Error::Device(text) = device(DriverError(code)) else { panic!("another variant") };
            assert!(text.starts_with(name) && text.contains(part), "{text}");
        }
    }
}
