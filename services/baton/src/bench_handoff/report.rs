//! What was measured, as a table and as JSON.

use crate::machine::{Machine, today};
use serde::Serialize;
use std::fmt;
use worker::handoff_speed::{Figures, Overlap, Requests, SizeFigures};

#[derive(Serialize)]
pub struct Report {
    date: String,
    #[serde(flatten)]
    machine: Machine,
    cores: usize,
    backend: String,
    #[serde(flatten)]
    figures: Figures,
}

impl Report {
    pub fn new(backend: &str, figures: Figures) -> Report {
        Report {
            date: today(),
            machine: Machine::of(backend),
            cores: std::thread::available_parallelism().map_or(0, usize::from),
            backend: backend.to_owned(),
            figures,
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Figures { link, sizes, overlap, requests } = &self.figures;
        if let Some(link) = link {
            let (down, up) = (link.down_gigabytes_per_second, link.up_gigabytes_per_second);
            writeln!(f, "link to the GPU, pinned memory: {down:.1} GB/s down, {up:.1} GB/s up")?;
        }
        sizes.iter().try_for_each(|size| write_size(f, size))?;
        write_overlap(f, overlap)?;
        write_requests(f, requests)
    }
}

fn write_size(f: &mut fmt::Formatter<'_>, size: &SizeFigures) -> fmt::Result {
    let SizeFigures { block_bytes, blocks, rounds, ways } = size;
    writeln!(f, "\n{blocks} blocks of {block_bytes} bytes, median of {rounds}")?;
    let head = ["GB/s", "of TCP", "of copy", "of link", "CPU s/GB"];
    writeln!(f, "{:32}{:>9}{:>9}{:>9}{:>9}{:>10}", "", head[0], head[1], head[2], head[3], head[4])?;
    for way in ways {
        let share = |share: f64| format!("{:.0} %", 100.0 * share);
        writeln!(
            f,
            "{:32}{:>9.2}{:>9}{:>9}{:>9}{:>10.2}",
            way.way,
            way.gigabytes_per_second,
            share(way.share_of_tcp),
            share(way.share_of_copy),
            way.share_of_slowest_link.map_or("-".to_owned(), share),
            way.cpu_seconds_per_gigabyte
        )?;
    }
    Ok(())
}

fn write_overlap(f: &mut fmt::Formatter<'_>, overlap: &Overlap) -> fmt::Result {
    let Overlap { chunks, chunk_bytes, chunk_milliseconds, tail_milliseconds, tail_in_chunks } = overlap;
    writeln!(
        f,
        "\nprefill in {chunks} chunks of {chunk_bytes} bytes, {chunk_milliseconds:.2} ms to send each: all is there \
         {tail_milliseconds:.2} ms after the last is computed, {tail_in_chunks:.2} chunks"
    )
}

fn write_requests(f: &mut fmt::Formatter<'_>, requests: &Requests) -> fmt::Result {
    let Requests { requests, prompt_tokens, milliseconds, milliseconds_p90, cpu_milliseconds } = requests;
    writeln!(
        f,
        "\nprotocol of a prompt of {prompt_tokens} tokens without its bytes: {milliseconds:.2} ms (p90 \
         {milliseconds_p90:.2}), {cpu_milliseconds:.2} ms of processor, median of {requests}"
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use worker::handoff_speed::WayFigures;

    #[test]
    fn a_way_is_a_row_and_json_has_the_same_figures() {
        let way = WayFigures {
            way: "gRPC".to_owned(),
            bytes: 1,
            gigabytes_per_second: 1.5,
            share_of_tcp: 0.75,
            share_of_copy: 0.5,
            share_of_slowest_link: None,
            cpu_seconds_per_gigabyte: 1.25,
        };
        let figures = Figures {
            link: None,
            sizes: vec![SizeFigures { block_bytes: 1024, blocks: 2, rounds: 3, ways: vec![way] }],
            overlap: Overlap {
                chunks: 16,
                chunk_bytes: 1,
                chunk_milliseconds: 2.0,
                tail_milliseconds: 3.0,
                tail_in_chunks: 1.5,
            },
            requests: Requests {
                requests: 9,
                prompt_tokens: 128,
                milliseconds: 0.5,
                milliseconds_p90: 0.75,
                cpu_milliseconds: 0.25,
            },
        };
        let report = Report::new("cpu", figures);
        let table = report.to_string();
        for part in ["2 blocks of 1024 bytes", "1.50", "75 %", "50 %", "1.25", "1.50 chunks", "0.50 ms"] {
            assert!(table.contains(part), "{part}: {table}");
        }
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["sizes"][0]["ways"][0]["share_of_tcp"], 0.75);
        assert_eq!((json["overlap"]["chunks"].as_u64(), json["gpu"].is_null()), (Some(16), true));
    }
}
