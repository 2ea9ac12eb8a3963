//! What was measured, in numbers: medians, and shares as medians of the pairs that were measured one after the other.

use super::{Way, carry::Run};
use kernels::cuda::LinkRates;
use serde::Serialize;

#[derive(Clone, Debug, Serialize)]
pub struct Figures {
    /// Of pinned host memory and the GPU; absent without one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub link: Option<Link>,
    pub sizes: Vec<SizeFigures>,
    pub overlap: Overlap,
    pub requests: Requests,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Link {
    pub down_gigabytes_per_second: f64,
    pub up_gigabytes_per_second: f64,
}

impl From<LinkRates> for Link {
    fn from(rates: LinkRates) -> Self {
        Link { down_gigabytes_per_second: rates.down, up_gigabytes_per_second: rates.up }
    }
}

#[derive(Clone, Debug, Serialize)]
pub struct SizeFigures {
    pub block_bytes: usize,
    pub blocks: u32,
    pub rounds: usize,
    pub ways: Vec<WayFigures>,
}

#[derive(Clone, Debug, Serialize)]
pub struct WayFigures {
    pub way: String,
    /// A backend's blocks consist of whole layers, so they may differ from the size asked for.
    pub bytes: usize,
    pub gigabytes_per_second: f64,
    pub share_of_tcp: f64,
    pub share_of_copy: f64,
    /// Of the plain connection or the link to the GPU, whichever is slower.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub share_of_slowest_link: Option<f64>,
    /// Of both processes, the system's part in it.
    pub cpu_seconds_per_gigabyte: f64,
}

/// A prompt whose chunks are sent while later ones compute.
#[derive(Clone, Debug, Serialize)]
pub struct Overlap {
    pub chunks: u32,
    pub chunk_bytes: usize,
    /// To send one.
    pub chunk_milliseconds: f64,
    /// From the end of prefill until decode has everything.
    pub tail_milliseconds: f64,
    pub tail_in_chunks: f64,
}

/// The protocol of a short prompt, its bytes left away.
#[derive(Clone, Debug, Serialize)]
pub struct Requests {
    pub requests: usize,
    pub prompt_tokens: u32,
    pub milliseconds: f64,
    pub milliseconds_p90: f64,
    /// Of both processes.
    pub cpu_milliseconds: f64,
}

/// `runs[way][round]`, `bytes[way]`.
pub fn compare(ways: &[Way], bytes: &[usize], runs: &[Vec<Run>], link: Option<LinkRates>) -> Vec<WayFigures> {
    let rates: Vec<Vec<f64>> = runs
        .iter()
        .zip(bytes)
        .map(|(runs, bytes)| runs.iter().map(|run| rate(*bytes, run)).collect())
        .collect();
    let reference = |way| ways.iter().position(|found| *found == way).map(|index| &rates[index]);
    let share = |rates: &[f64], of| reference(of).map_or(f64::NAN, |of| median(&ratios(rates, of)));
    let slowest = link.zip(reference(Way::Tcp)).map(|(link, tcp)| link.down.min(link.up).min(median(tcp)));
    let figures = |(index, way): (usize, &Way)| {
        let (rates, gigabytes) = (&rates[index], bytes[index] as f64 / 1e9);
        let cpu: Vec<f64> = runs[index].iter().map(|run| run.cpu_seconds / gigabytes).collect();
        WayFigures {
            way: way.to_string(),
            bytes: bytes[index],
            gigabytes_per_second: median(rates),
            share_of_tcp: share(rates, Way::Tcp),
            share_of_copy: share(rates, Way::Copy),
            share_of_slowest_link: slowest.map(|slowest| median(rates) / slowest),
            cpu_seconds_per_gigabyte: median(&cpu),
        }
    };
    ways.iter().enumerate().map(figures).collect()
}

fn rate(bytes: usize, run: &Run) -> f64 {
    bytes as f64 / 1e9 / run.seconds
}

fn ratios(of: &[f64], to: &[f64]) -> Vec<f64> {
    of.iter().zip(to).map(|(of, to)| of / to).collect()
}

pub fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// NaN of nothing.
pub fn quantile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let index = (share * sorted.len() as f64) as usize;
    sorted.get(index.min(sorted.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(seconds: f64) -> Run {
        Run { seconds, cpu_seconds: 2.0 * seconds, tail_seconds: 0.0 }
    }

    #[test]
    fn shares_are_of_pairs() {
        // The machine was three times slower in the second round, which no pair notices.
        let runs = [vec![run(1.0), run(3.0), run(1.0)], vec![run(2.0), run(6.0), run(2.0)]];
        let link = Some(LinkRates { down: 1.0, up: 0.5 });
        let found =
            compare(&[Way::Tcp, Way::Grpc(super::super::Memory::Host)], &[2_000_000_000; 2], &runs, link);
        assert_eq!((found[0].gigabytes_per_second, found[0].share_of_tcp), (2.0, 1.0));
        assert_eq!((found[1].gigabytes_per_second, found[1].share_of_tcp), (1.0, 0.5));
        assert_eq!((found[1].cpu_seconds_per_gigabyte, found[1].share_of_slowest_link), (2.0, Some(2.0)));
        assert!(found[1].share_of_copy.is_nan());
    }

    #[test]
    fn quantiles() {
        assert_eq!((median(&[3.0, 1.0, 2.0]), quantile(&[1.0, 2.0, 3.0, 4.0], 0.9)), (2.0, 4.0));
        assert!(median(&[]).is_nan());
    }
}
