//! The one binary.

fn main() -> std::process::ExitCode {
    baton::main()
}
