//! One service as a child process: started from this same binary, heard on stdout for its addresses,
//! logged to a file, ended by SIGTERM and, if that does not help, SIGKILL.

use anyhow::{Context, anyhow, bail};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{ExitStatus, Stdio},
    time::Duration,
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child as Process, ChildStdout, Command},
    time::timeout,
};

/// What a service prints when its ports are bound.
#[derive(Deserialize)]
struct Announcement {
    listening: Addresses,
}

#[derive(Clone, Debug, Default, Deserialize)]
pub struct Addresses {
    #[serde(default)]
    pub grpc: String,
    #[serde(default)]
    pub http: String,
    pub admin: String,
}

pub struct Child {
    pub name: String,
    pub pid: u32,
    pub addresses: Addresses,
    process: Process,
    stdout: Option<BufReader<ChildStdout>>,
    log: Option<PathBuf>,
}

impl Child {
    /// Starts `baton <arguments>`. With no log directory its log goes to this process's stderr.
    pub fn start(name: String, arguments: &[String], logs: Option<&Path>) -> anyhow::Result<Child> {
        let log = logs.map(|directory| directory.join(format!("{name}.log")));
        let mut command = Command::new(std::env::current_exe()?);
        command.args(arguments).env(crate::serve::PARENT, std::process::id().to_string());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).kill_on_drop(true);
        // A group of its own: Ctrl-C reaches `up` alone, which then stops everybody in order.
        command.process_group(0);
        if let Some(path) = &log {
            let file = File::options().create(true).append(true).open(path);
            command.stderr(file.with_context(|| format!("cannot write the log {}", path.display()))?);
        }
        let mut process = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let stdout = process.stdout.take().map(BufReader::new);
        let pid = process.id().context("the process has no id")?;
        Ok(Child { name, pid, addresses: Addresses::default(), process, stdout, log })
    }

    /// Waits for the line with the addresses.
    pub async fn listening(&mut self, patience: Duration) -> anyhow::Result<()> {
        let Some(mut stdout) = self.stdout.take() else { return Ok(()) };
        let mut line = String::new();
        match timeout(patience, stdout.read_line(&mut line)).await {
            Err(_) => bail!("{} did not bind its ports within {patience:?}{}", self.name, self.tail()),
            Ok(Ok(0)) => Err(self.died().await),
            Ok(read) => {
                read?;
                let said: Announcement = serde_json::from_str(&line)
                    .with_context(|| format!("{} said {line:?} instead of its addresses", self.name))?;
                self.addresses = said.listening;
                Ok(())
            }
        }
    }

    pub async fn wait(&mut self) -> anyhow::Result<ExitStatus> {
        Ok(self.process.wait().await?)
    }

    /// The error for a child that ended by itself.
    pub async fn died(&mut self) -> anyhow::Error {
        match self.process.wait().await {
            Ok(status) => anyhow!("{} ended with {status}{}", self.name, self.tail()),
            Err(error) => anyhow!("{} is gone: {error}", self.name),
        }
    }

    pub fn terminate(&self) {
        if let Some(pid) = self.process.id().and_then(|pid| Pid::from_raw(pid as i32)) {
            let _ = kill_process(pid, Signal::TERM);
        }
    }

    pub async fn kill(&mut self) {
        let _ = self.process.kill().await;
    }

    /// The last lines of the log, for an error message.
    fn tail(&self) -> String {
        let Some(path) = &self.log else { return String::new() };
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = &lines[lines.len().saturating_sub(8)..];
        format!("; the end of {}:\n  {}", path.display(), last.join("\n  "))
    }
}
