//! Time of a decode step by its batch, from what was observed: interpolated inside, and said when beyond.

use super::measured::Point;
use serde::Serialize;

/// Observed batches that lie closer together than this say nothing of a slope.
const SPREAD: f64 = 1.2;
/// Beyond the largest batch observed, at most so many times.
const BEYOND: f64 = 2.0;

/// seconds = fixed + each · batch, fitted to the points by least squares, each weighing as many as its steps.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Curve {
    pub fixed: f64,
    pub each: f64,
    /// Smallest and largest batch observed.
    pub from: f64,
    pub to: f64,
}

/// The batch to run at, and how it is known.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Operating {
    pub batch: f64,
    /// Of a step.
    pub seconds: f64,
    pub extrapolated: bool,
    /// The target allows more than is trusted.
    pub at_edge: bool,
    /// Not even a batch of one is fast enough.
    pub unreachable: bool,
}

impl Curve {
    /// `None`: nothing was decoded.
    pub fn fit(points: &[Point]) -> Option<Curve> {
        let weight: f64 = points.iter().map(|point| point.steps).sum();
        if weight <= 0.0 {
            return None;
        }
        let mean = |of: fn(&Point) -> f64| points.iter().map(|p| of(p) * p.steps).sum::<f64>() / weight;
        let (batch, seconds) = (mean(|p| p.batch), mean(|p| p.seconds));
        let from = points.iter().map(|point| point.batch).fold(f64::MAX, f64::min);
        let to = points.iter().map(|point| point.batch).fold(0.0, f64::max);
        if to < from * SPREAD {
            // One batch: what it costs to change it is not known.
            return Some(Curve { fixed: seconds, each: 0.0, from, to });
        }
        let along: f64 = points.iter().map(|p| p.steps * (p.batch - batch) * (p.seconds - seconds)).sum();
        let spread: f64 = points.iter().map(|p| p.steps * (p.batch - batch).powi(2)).sum();
        // A step of a larger batch is never faster, and never takes less than nothing.
        let each = (along / spread).clamp(0.0, seconds / batch);
        Some(Curve { fixed: seconds - each * batch, each, from, to })
    }

    pub fn at(&self, batch: f64) -> f64 {
        self.fixed + self.each * batch
    }

    /// Tokens a second of a worker at this batch.
    pub fn rate(&self, batch: f64) -> f64 {
        batch / self.at(batch)
    }

    /// The largest batch whose step takes at most `target`. Without a slope none but the observed ones are trusted.
    pub fn operating(&self, target: f64) -> Operating {
        let most = if self.each > 0.0 { self.to * BEYOND } else { self.to };
        let fits = match self.each > 0.0 {
            true => ((target - self.fixed) / self.each).min(most),
            false if self.fixed <= target => most,
            // In proportion, and no faster for that: cautious, as nothing else is known.
            false => self.to * target / self.fixed,
        };
        let batch = fits.max(1.0);
        Operating {
            batch,
            seconds: self.at(batch),
            extrapolated: batch > self.to * 1.01 || batch < self.from * 0.99,
            at_edge: fits >= most,
            unreachable: fits < 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn points(of: &[(f64, f64)]) -> Vec<Point> {
        of.iter().map(|(batch, seconds)| Point { batch: *batch, seconds: *seconds, steps: 10.0 }).collect()
    }

    #[test]
    fn a_straight_line_is_found_again() {
        let curve = Curve::fit(&points(&[(2.0, 0.012), (4.0, 0.014), (10.0, 0.020)])).unwrap();
        assert!((curve.fixed - 0.010).abs() < 1e-9 && (curve.each - 0.001).abs() < 1e-9, "{curve:?}");
        let inside = curve.operating(0.018);
        assert!((inside.batch - 8.0).abs() < 1e-6 && !inside.extrapolated && !inside.at_edge, "{inside:?}");
        let beyond = curve.operating(0.025);
        assert!((beyond.batch - 15.0).abs() < 1e-6 && beyond.extrapolated, "{beyond:?}");
        assert_eq!(curve.operating(1.0).batch, 20.0, "never more than twice what was observed");
        let never = curve.operating(0.005);
        assert!(never.unreachable && never.batch == 1.0);
    }

    #[test]
    fn one_batch_says_nothing_of_others() {
        let curve = Curve::fit(&points(&[(8.0, 0.02), (8.2, 0.02)])).unwrap();
        let enough = curve.operating(0.05);
        assert_eq!((enough.batch, enough.extrapolated, enough.at_edge), (8.2, false, true));
        let less = curve.operating(0.01);
        assert!((less.batch - 4.1).abs() < 1e-9 && less.extrapolated, "{less:?}");
        assert_eq!(Curve::fit(&[]), None);
    }

    #[test]
    fn a_looser_target_never_wants_a_smaller_batch() {
        let curve = Curve::fit(&points(&[(1.0, 0.011), (3.0, 0.013), (9.0, 0.03)])).unwrap();
        let batches: Vec<f64> = (1..80).map(|ms| curve.operating(f64::from(ms) / 1e3).batch).collect();
        assert!(batches.windows(2).all(|pair| pair[0] <= pair[1]));
    }
}
