//! `baton plan` beside `baton bench` on a simulated cluster whose times are known: long prompts ask for prefill workers, long
//! answers for decode workers.

use crate::harness::{Cluster, alone, baton};
use serde_json::Value;
use std::process::{Child, Command, Stdio};

struct Load(Child);

impl Load {
    fn start(cluster: &Cluster, arguments: &[&str]) -> Self {
        let mut bench = Command::new(baton());
        bench.args(["bench", "--url", &cluster.url, "--requests", "100000", "--warmup", "4"]).args(arguments);
        Load(bench.stdout(Stdio::null()).spawn().unwrap())
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn plan(cluster: &Cluster, arguments: &[&str]) -> Value {
    let mut plan = Command::new(baton());
    plan.args(["plan", "--url", &cluster.url, "--router", &cluster.router.admin, "--window", "6s", "--json"]);
    let output = plan.args(arguments).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

fn wanted(plan: &Value, pool: &str) -> (u64, String) {
    let pool = &plan["plan"][pool];
    (pool["wanted"].as_u64().unwrap(), pool["binding"].as_str().unwrap().to_owned())
}

#[test]
fn plan_asks_for_the_pool_that_the_load_needs() {
    let _alone = alone();
    // A prompt token takes 100 µs, a decode step 10 ms and 1 ms for each sequence.
    let cost = ["launch_us=10000", "sequence_us=1000", "context_ns=0", "prompt_us=100"];
    let sets: Vec<String> = cost.iter().map(|set| format!("simulated.{set}")).collect();
    let mut arguments = vec!["--backend", "sim", "--block-tokens", "64", "--chunk", "2048"];
    arguments.extend(sets.iter().flat_map(|set| ["--worker-set", set.as_str()]));
    let cluster = Cluster::up(&arguments);

    let idle =
        Command::new(baton()).args(["plan", "--url", &cluster.url, "--window", "2s"]).output().unwrap();
    assert!(String::from_utf8_lossy(&idle.stderr).contains("a plan needs load"), "{idle:?}");

    // Six prompts a second of 1500 tokens: 0.96 of a worker, and 160 ms each.
    let load = ["--rate", "6", "--prompt-tokens", "1500", "--output-tokens", "3"];
    let prompts = Load::start(&cluster, &load);
    let long_prompts = plan(&cluster, &["--ttft-ms", "400", "--itl-ms", "100"]);
    drop(prompts);
    let (prefill, by) = wanted(&long_prompts, "prefill");
    assert!(prefill >= 2 && ["rate", "ttft"].contains(&by.as_str()), "{long_prompts:#}");
    assert_eq!(wanted(&long_prompts, "decode").0, 1, "{long_prompts:#}");
    let measured = &long_prompts["measured"];
    let near = |value: &Value, expected: f64, share: f64| {
        let found = value.as_f64().unwrap();
        assert!(
            (found - expected).abs() <= expected * share,
            "{found} is not about {expected}: {measured:#}"
        );
    };
    near(&measured["requests"], 6.0, 0.35);
    // What begins before the window and ends in it is counted half.
    near(&measured["prompt_tokens"], 1500.0, 0.25);
    near(&measured["completion_tokens"], 3.0, 0.25);
    near(&measured["prefill"]["speed"], 1500.0 / 0.16, 0.35);

    // Sixteen answers at a time: steps of 26 ms, where 18 are wanted.
    let load = ["--concurrency", "16", "--prompt-tokens", "16", "--output-tokens", "100"];
    let answers = Load::start(&cluster, &load);
    std::thread::sleep(std::time::Duration::from_secs(1));
    let long_answers = plan(&cluster, &["--ttft-ms", "2000", "--itl-ms", "18"]);
    drop(answers);
    let (decode, by) = wanted(&long_answers, "decode");
    assert!(decode >= 2 && by == "itl", "{long_answers:#}");
    assert_eq!(wanted(&long_answers, "prefill").0, 1, "{long_answers:#}");
    let signals = long_answers["autoscaling"].as_array().unwrap();
    let suggested = signals.iter().find(|signal| signal["name"] == "interTokenSeconds").unwrap();
    assert_eq!(suggested["suggested"], 0.018);
}
