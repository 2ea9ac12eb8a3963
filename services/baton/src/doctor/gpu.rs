//! GPUs of this machine, if something here computes on them: library, driver, compute capability, MIG, memory, errors.

use super::finding::Finding;
use std::process::Command;

const CHECK: &str = "gpu";
/// Kernels are built with CUDA 13.0, whose binaries need this driver.
const DRIVER: u32 = 580;
/// Kernels are built for this one: Hopper.
const CAPABILITY: &str = "9.0";
const QUERY: &str = "name,driver_version,compute_cap,memory.total,memory.free,mig.mode.current,ecc.errors.uncorrected.volatile.total";

/// One GPU as nvidia-smi tells it. Memory is in MiB.
#[derive(Clone, Debug, PartialEq)]
pub struct Gpu {
    pub name: String,
    pub driver: String,
    pub capability: String,
    pub total: u64,
    pub free: u64,
    pub mig: bool,
    /// Uncorrected since the driver was loaded; absent where there is no ECC.
    pub errors: Option<u64>,
}

pub struct Found {
    /// Whether this binary has kernels, and whether libcuda can be loaded.
    pub kernels: bool,
    pub libcuda: bool,
    pub gpus: Result<Vec<Gpu>, String>,
}

pub fn gather() -> Found {
    let (kernels, libcuda) = worker::cuda();
    Found { kernels, libcuda, gpus: ask() }
}

fn ask() -> Result<Vec<Gpu>, String> {
    let output = Command::new("nvidia-smi")
        .args([format!("--query-gpu={QUERY}"), "--format=csv,noheader,nounits".to_owned()])
        .output()
        .map_err(|error| format!("nvidia-smi cannot be run: {error}"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        return Err(format!("nvidia-smi: {}", text.trim()));
    }
    text.lines()
        .map(|line| read(line).ok_or_else(|| format!("nvidia-smi says what cannot be read: {line}")))
        .collect()
}

fn read(line: &str) -> Option<Gpu> {
    let words: Vec<&str> = line.split(',').map(str::trim).collect();
    let [name, driver, capability, total, free, mig, errors] = words.as_slice() else { return None };
    Some(Gpu {
        name: (*name).to_owned(),
        driver: (*driver).to_owned(),
        capability: (*capability).to_owned(),
        total: total.parse().ok()?,
        free: free.parse().ok()?,
        mig: *mig == "Enabled",
        errors: errors.parse().ok(),
    })
}

/// `share`: the largest `gpu_memory_utilization` of a worker that is to start here; absent if such workers run already.
pub fn judge(found: &Found, share: Option<f32>) -> Vec<Finding> {
    if !found.libcuda {
        let why = match &found.gpus {
            Ok(_) => "libcuda.so.1 was not found, though nvidia-smi is here",
            Err(_) => "no GPU: neither libcuda.so.1 nor nvidia-smi is here",
        };
        return vec![
            Finding::not_checked(CHECK, "this machine", why)
                .remedy("run this on the workers' machines; there, install the NVIDIA driver, or give the container its GPUs"),
        ];
    }
    let mut findings = Vec::new();
    if !found.kernels {
        let found = Finding::error(CHECK, "this binary", "was built without CUDA kernels");
        let found = found.expected("kernels in it, as backend = \"cuda\" is asked for");
        findings.push(found.remedy("build it with --features cuda (make cuda), or use the image baton-cuda"));
    }
    match &found.gpus {
        Ok(gpus) => findings.extend(gpus.iter().zip(0..).map(|(gpu, index)| one(index, gpu, share))),
        Err(why) => findings.push(Finding::not_checked(CHECK, "GPUs", why)),
    }
    findings
}

fn one(index: u32, gpu: &Gpu, share: Option<f32>) -> Finding {
    let subject = format!("GPU {index}");
    let Gpu { name, driver, capability, total, free, .. } = gpu;
    let major: u32 = driver.split('.').next().and_then(|major| major.parse().ok()).unwrap_or(0);
    if capability != CAPABILITY {
        return Finding::error(CHECK, subject, format!("{name} has compute capability {capability}"))
            .expected(format!("{CAPABILITY} (Hopper): the kernels are built for nothing else"))
            .remedy("run on H100, H200 or GH200, or use --backend cpu");
    }
    if major < DRIVER {
        return Finding::error(CHECK, subject, format!("driver {driver}"))
            .expected(format!("{DRIVER} or newer: the kernels are built with CUDA 13.0"))
            .remedy("install a newer NVIDIA driver on the machine");
    }
    if gpu.mig {
        return Finding::warning(CHECK, subject, "MIG is on").expected("a whole GPU for each worker").remedy(
            "turn MIG off (nvidia-smi -mig 0), or count with the memory and processors of one slice",
        );
    }
    if let Some(errors @ 1..) = gpu.errors {
        return Finding::warning(CHECK, subject, format!("{errors} uncorrected memory errors since the driver was loaded"))
            .expected("none")
            .remedy("drain the worker, reset the GPU, and replace it if they come back (nvidia-smi -q -d ECC,ROW_REMAPPER)");
    }
    if let Some(share) = share.filter(|share| (*free as f64) < *total as f64 * f64::from(*share)) {
        return Finding::warning(CHECK, subject, format!("{free} of {total} MiB are free"))
            .expected(format!("{share} of it, as gpu_memory_utilization says"))
            .remedy("end what else uses this GPU (nvidia-smi), or lower gpu_memory_utilization");
    }
    let memory = format!("{free} of {total} MiB free");
    Finding::ok(CHECK, subject, format!("{name}, driver {driver}, compute capability {capability}, {memory}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::finding::Severity;

    const LINE: &str = "NVIDIA H100 80GB HBM3, 580.95.05, 9.0, 81559, 81000, Disabled, 0";

    fn judged(change: impl Fn(&mut Gpu)) -> Finding {
        let mut gpu = read(LINE).unwrap();
        change(&mut gpu);
        one(0, &gpu, Some(0.9))
    }

    #[test]
    fn a_line_is_read() {
        let gpu = read(LINE).unwrap();
        assert_eq!((gpu.total, gpu.mig, gpu.errors), (81559, false, Some(0)));
        assert_eq!(read(&LINE.replace(", 0", ", [N/A]").replace("Disabled", "[N/A]")).unwrap().errors, None);
        assert_eq!(read("No devices were found"), None);
    }

    #[test]
    fn each_fault_is_told() {
        assert_eq!(judged(|_| {}).severity, Severity::Ok);
        for (finding, severity, part) in [
            (judged(|gpu| gpu.capability = "8.0".into()), Severity::Error, "8.0"),
            (judged(|gpu| gpu.driver = "535.104.05".into()), Severity::Error, "535"),
            (judged(|gpu| gpu.mig = true), Severity::Warning, "MIG"),
            (judged(|gpu| gpu.errors = Some(3)), Severity::Warning, "3 uncorrected"),
            (judged(|gpu| gpu.free = 100), Severity::Warning, "100 of"),
        ] {
            assert!(finding.severity == severity && finding.found.contains(part), "{finding:?}");
            assert!(!finding.remedy.is_empty());
        }
    }

    #[test]
    fn without_a_gpu_nothing_is_claimed() {
        let found = Found { kernels: false, libcuda: false, gpus: Err("nvidia-smi cannot be run".into()) };
        let findings = judge(&found, None);
        assert_eq!((findings.len(), findings[0].severity), (1, Severity::NotChecked));
        let found = Found { kernels: false, libcuda: true, gpus: Ok(vec![read(LINE).unwrap()]) };
        let severities: Vec<Severity> = judge(&found, None).iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Ok]);
    }
}
