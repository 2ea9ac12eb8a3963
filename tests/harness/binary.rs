//! The `baton` binaries under test: built, once, beside this test binary and in its profile.

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

/// Root of the repository.
pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap()
}

pub fn baton() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build("baton", if has_nixl() { &["--features", "rdma"] } else { &[] }))
}

/// The same with phases that can be held.
pub fn baton_failpoints() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| build("baton-failpoints", &["--features", "failpoints"]))
}

fn build(binary: &str, arguments: &[&str]) -> PathBuf {
    // …/target/<profile>/deps/cluster-<hash>
    let profile = std::env::current_exe().unwrap().parent().unwrap().parent().unwrap().to_owned();
    let mut build = Command::new(env!("CARGO"));
    build.args(["build", "-q", "--locked", "-p", "baton", "--bin", binary]).current_dir(root());
    build.args(arguments).arg("--target-dir").arg(profile.parent().unwrap());
    if profile.ends_with("release") {
        build.arg("--release");
    }
    assert!(build.status().expect("cargo runs").success(), "{binary} does not build");
    profile.join(binary)
}

/// Whether the binary under test has the transport through NIXL, as `make test-rdma` asks.
pub fn has_nixl() -> bool {
    std::env::var_os("BATON_NIXL_REQUIRED").is_some()
}
