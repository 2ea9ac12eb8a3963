//! The one binary, in which tests can hold a request's phases; see `telemetry::phase`.

fn main() -> std::process::ExitCode {
    baton::main()
}
