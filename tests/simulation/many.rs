//! Many seeds, each in a process of its own, as many at once as there are cores. What fails is told with the
//! command that replays it, and its log is kept.

use crate::{device::Broken, run::Verdict};
use anyhow::{Context, bail};
use std::{
    collections::BTreeMap,
    fs,
    ops::Range,
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::{
        Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// Seeds whose second run must give the same hash, of those in continuous integration.
const TWICE: u64 = 24;
/// Seeds within which each [`Broken`] must have been noticed.
const TEETH: u64 = 40;
/// A process that takes longer in real time does not end by itself.
const STUCK: Duration = Duration::from_secs(120);
/// Between two lines of progress.
const PROGRESS: u64 = 50;

/// What continuous integration wants: seeds, some of them twice, and proof that faults would show.
pub fn prove(seeds: Range<u64>) -> anyhow::Result<ExitCode> {
    let failed = run_all(seeds.clone())?;
    let twice = (seeds.end - TWICE.min(seeds.end - seeds.start))..seeds.end;
    for seed in twice.clone() {
        let (one, other) = (child(seed, None)?, child(seed, None)?);
        if one.events == 0 || (one.hash, one.events) != (other.hash, other.events) {
            bail!("seed {seed} gives {:016x} and {:016x}: something is not simulated", one.hash, other.hash);
        }
    }
    println!("simulation: {} seeds run twice, with the same hash of all events", twice.end - twice.start);
    for (name, broken) in Broken::ALL {
        println!("simulation: broken by `{name}`: noticed in seed {}", noticed(name, broken)?);
    }
    Ok(if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

pub fn run(seeds: Range<u64>) -> anyhow::Result<ExitCode> {
    Ok(if run_all(seeds)? { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The first seed that shows it.
fn noticed(name: &str, broken: Broken) -> anyhow::Result<u64> {
    for seed in 0..TEETH {
        let verdict = child(seed, Some((name, broken)))?;
        // A process that ended without a word has noticed nothing.
        if verdict.violation.is_some() && verdict.events > 0 {
            return Ok(seed);
        }
    }
    bail!("{TEETH} seeds do not notice what is broken by `{name}`")
}

/// Whether any failed.
fn run_all(seeds: Range<u64>) -> anyhow::Result<bool> {
    let began = Instant::now();
    let (next, sum) = (AtomicU64::new(seeds.start), Mutex::new(Sum::default()));
    let work = || -> anyhow::Result<()> {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return Ok(());
            }
            let verdict = child(seed, None)?;
            if let Some(violation) = &verdict.violation {
                tell(seed, violation)?;
            }
            let mut sum = sum.lock().expect("sound");
            sum.add(&verdict);
            if sum.seeds.is_multiple_of(PROGRESS) {
                println!("simulation: {sum}, {:.0} s", began.elapsed().as_secs_f32());
            }
        }
    };
    let cores = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..cores).map(|_| scope.spawn(work)).collect();
        workers.into_iter().try_for_each(|worker| worker.join().expect("no panic"))
    })?;
    let sum = sum.into_inner().expect("sound");
    println!("simulation: {sum}, {:.0} s", began.elapsed().as_secs_f32());
    sum.counts.iter().for_each(|(name, count)| println!("  {name} {count}"));
    Ok(sum.violations > 0)
}

fn child(seed: u64, broken: Option<(&str, Broken)>) -> anyhow::Result<Verdict> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["--seed", &seed.to_string(), "--quiet"]);
    if let Some((name, _)) = broken {
        command.args(["--broken", name]);
    }
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn()?;
    let began = Instant::now();
    while child.try_wait()?.is_none() {
        if began.elapsed() > STUCK {
            child.kill()?;
        }
        thread::sleep(Duration::from_millis(5));
    }
    let output = child.wait_with_output()?;
    let verdict = serde_json::from_slice(&output.stdout);
    Ok(verdict.unwrap_or_else(|_| Verdict {
        seed,
        violation: Some(format!("the process ended with {} and without a verdict", output.status)),
        ..Verdict::default()
    }))
}

/// With everything that a replay says in a file.
fn tell(seed: u64, violation: &str) -> anyhow::Result<()> {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    fs::create_dir_all(&folder)?;
    let log = folder.join(format!("simulation-{seed}.log"));
    let file = fs::File::create(&log).with_context(|| log.display().to_string())?;
    let mut replay = Command::new(std::env::current_exe()?);
    let mut replay = replay.args(["--seed", &seed.to_string()]).stdout(Stdio::null()).stderr(file).spawn()?;
    let began = Instant::now();
    while replay.try_wait()?.is_none() && began.elapsed() < STUCK {
        thread::sleep(Duration::from_millis(20));
    }
    let _ = replay.kill();
    replay.wait()?;
    println!(
        "simulation: seed {seed} FAILED: {violation}\n  replay it: make simulate SEED={seed}\n  its log: {}",
        log.display()
    );
    Ok(())
}

/// Of many verdicts.
#[derive(Default)]
struct Sum {
    seeds: u64,
    requests: u64,
    answered: u64,
    left: u64,
    failed: BTreeMap<String, u64>,
    faults: u64,
    simulated_ms: u64,
    counts: BTreeMap<String, u64>,
    longest_ms: u64,
    settled_ms: u64,
    served_ms: u64,
    violations: u64,
}

impl Sum {
    fn add(&mut self, verdict: &Verdict) {
        self.seeds += 1;
        self.requests += verdict.requests;
        self.answered += verdict.answered;
        self.left += verdict.left;
        verdict.failed.iter().for_each(|(code, n)| *self.failed.entry(code.clone()).or_default() += n);
        self.faults += verdict.faults;
        self.simulated_ms += verdict.simulated_ms;
        verdict.counts.iter().for_each(|(name, n)| *self.counts.entry(name.clone()).or_default() += n);
        self.longest_ms = self.longest_ms.max(verdict.longest_ms);
        self.settled_ms = self.settled_ms.max(verdict.settled_ms);
        self.served_ms = self.served_ms.max(verdict.served_ms);
        self.violations += u64::from(verdict.violation.is_some());
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Sum { seeds, requests, answered, left, faults, violations, .. } = self;
        write!(
            out,
            "{seeds} seeds, {faults} faults, {requests} requests: {answered} answered, {left} left, failed {:?}; \
             {violations} violations; at worst a request took {} ms, nothing was held {} ms after the last, \
             a request was answered {} ms later; {} s simulated",
            self.failed,
            self.longest_ms,
            self.settled_ms,
            self.served_ms,
            self.simulated_ms / 1_000
        )
    }
}
