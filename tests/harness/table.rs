//! The table that a proof leaves behind: one row a fault, as Markdown and as JSON.

use super::root;
use serde_json::{Value, json};
use std::{fmt::Write, process::Command, time::Duration};

pub struct Row {
    pub fault: String,
    /// Where requests were held; empty: anywhere.
    pub phase: &'static str,
    /// When the fault struck.
    pub in_flight: usize,
    /// Placements that failed, sequences that moved, answers that another router went on with.
    pub moved: u64,
    /// Answers equal to the undisturbed ones.
    pub served: usize,
    /// Errors that clients were told.
    pub told: Vec<String>,
    /// Answers other than the undisturbed ones.
    pub differs: Vec<String>,
    /// The longest time that any stream stood still after the fault; `None`: not all flowed again.
    pub pause: Option<Duration>,
    pub leaked: u32,
    pub took: Duration,
}

pub struct Table {
    pub streams: usize,
    pub rows: Vec<Row>,
}

impl Row {
    pub fn line(&self) -> String {
        let pause = self.pause.map_or("never".into(), |pause| format!("{:.2} s", pause.as_secs_f32()));
        let cells = [
            self.fault.clone(),
            self.phase.into(),
            self.in_flight.to_string(),
            self.moved.to_string(),
            format!("{} of {}", self.served, self.served + self.differs.len()),
            self.told.len().to_string(),
            pause,
            self.leaked.to_string(),
        ];
        format!("| {} |", cells.join(" | "))
    }

    fn json(&self) -> Value {
        json!({
            "fault": self.fault, "phase": self.phase, "in_flight": self.in_flight, "moved": self.moved,
            "answers_equal": self.served, "answers_different": self.differs.len(), "errors": self.told,
            "longest_pause_seconds": self.pause.map(|pause| pause.as_secs_f64()),
            "leaked_blocks": self.leaked, "took_seconds": self.took.as_secs_f64(),
        })
    }
}

impl Table {
    pub fn new(streams: usize) -> Self {
        Table { streams, rows: Vec::new() }
    }

    pub fn markdown(&self) -> String {
        let mut text = String::from(
            "| fault | phase | in flight | moved | answers equal | errors told | longest pause | blocks leaked |\n\
             | --- | --- | --- | --- | --- | --- | --- | --- |\n",
        );
        self.rows.iter().for_each(|row| writeln!(text, "{}", row.line()).unwrap());
        text
    }

    /// Beside the other proofs, dated.
    pub fn write(&self, name: &str) {
        let date = Command::new("date").args(["-u", "+%F"]).output().expect("date runs");
        let date = String::from_utf8_lossy(&date.stdout).trim().to_owned();
        let path = |extension: &str| root().join(format!("tests/proofs/{name}-{date}.{extension}"));
        let rows: Vec<Value> = self.rows.iter().map(Row::json).collect();
        let whole = json!({ "date": date, "streams": self.streams, "rows": rows });
        std::fs::write(path("json"), serde_json::to_string_pretty(&whole).unwrap() + "\n").unwrap();
        std::fs::write(
            path("md"),
            format!("# Faults, {date}\n\n{} streams.\n\n{}", self.streams, self.markdown()),
        )
        .unwrap();
    }

    /// No answer differs, every stream flows again, nothing is held; and no client was told an error.
    pub fn assert_sound(&self) {
        let mut unsound = String::new();
        for row in &self.rows {
            let sound =
                row.differs.is_empty() && row.pause.is_some() && row.leaked == 0 && row.told.is_empty();
            if !sound || row.served == 0 {
                writeln!(unsound, "{}\n  told: {:#?}\n  differs: {:#?}", row.line(), row.told, row.differs)
                    .unwrap();
            }
        }
        assert!(unsound.is_empty(), "{unsound}");
    }
}
