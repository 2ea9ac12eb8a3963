//! Whole clusters in one thread and in simulated time, disturbed by what a seed says, and held to what must be true of
//! every answer and every block. The code of gateway, router and worker is the real one; simulated are the network, the
//! membership's source, the device, the clock and chance.
//!
//! Every seed runs in a process of its own, so that it gives the same alone as among thousands:
//! `cargo test -p tests --test simulation -- --seed 17` shows one, `--seeds 0..300` runs many.

mod check;
mod client;
mod cluster;
mod device;
mod faults;
mod journal;
mod nature;
mod net;
mod pipe;
mod run;
mod shape;
mod workload;

fn main() -> std::process::ExitCode {
    let mut arguments = std::env::args().skip(1);
    let verdict = run::run(arguments.nth(1).unwrap().parse().unwrap(), None, true);
    println!("{}", serde_json::to_string(&verdict).unwrap());
    std::process::ExitCode::SUCCESS
}
