//! Feature `cuda`: compiles every `cuda/*.cu` to a cubin per architecture and writes the table of them that
//! `src/cuda/device.rs` embeds. Without the feature the table is empty and nothing is run.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

fn main() {
    println!("cargo:rerun-if-changed=cuda");
    println!("cargo:rerun-if-env-changed=CUDA_HOME");
    println!("cargo:rerun-if-env-changed=CUDA_ARCHS");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let mut table = String::from("&[\n");
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let archs = env::var("CUDA_ARCHS").unwrap_or_else(|_| "90a".to_string());
        for source in sources() {
            for arch in archs.split(',').map(str::trim) {
                let cubin = compile(&source, arch, &out);
                let family = source.file_stem().expect("a file").to_string_lossy().into_owned();
                table += &format!("    ({family:?}, {arch:?}, include_bytes!({:?})),\n", cubin.display());
            }
        }
    }
    table += "]\n";
    fs::write(out.join("cubins.rs"), table).expect("OUT_DIR is writable");
}

fn sources() -> Vec<PathBuf> {
    let mut sources: Vec<_> = fs::read_dir("cuda")
        .expect("kernels/cuda")
        .map(|entry| entry.expect("kernels/cuda").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "cu"))
        .collect();
    sources.sort();
    sources
}

fn compile(source: &Path, arch: &str, out: &Path) -> PathBuf {
    let nvcc = nvcc();
    let cubin = out.join(source.with_extension(format!("sm_{arch}.cubin")).file_name().expect("a file"));
    let code = format!("-gencode=arch=compute_{arch},code=sm_{arch}");
    let status = Command::new(&nvcc)
        .args(["-cubin", "-O3", "-std=c++17", "--expt-relaxed-constexpr", "-lineinfo", &code, "-o"])
        .arg(&cubin)
        .arg(source)
        .status();
    match status {
        Ok(status) if status.success() => cubin,
        Ok(status) => panic!("{} did not compile: nvcc {status}", source.display()),
        Err(error) => panic!(
            "feature cuda needs nvcc, and {} does not run ({error}); set CUDA_HOME to a CUDA 13 toolkit, or \
             `pip install nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-cccl nvidia-cuda-runtime` \
             (13.0) and set it to site-packages/nvidia/cu13",
            nvcc.display()
        ),
    }
}

fn nvcc() -> PathBuf {
    match env::var_os("CUDA_HOME") {
        Some(home) => Path::new(&home).join("bin/nvcc"),
        None => PathBuf::from("nvcc"),
    }
}
