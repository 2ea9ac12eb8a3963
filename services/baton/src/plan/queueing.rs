//! How long work waits for one of several servers: M/M/c, first come first served. Arrivals as of independent clients, service
//! times exponential, which is cautious: at equal load steady ones wait half as long.
//! Source: Erlang 1917; Gross and Harris, Fundamentals of Queueing Theory, M/M/c.

/// Probability that work has to wait. `load`: servers kept busy on average; 1 from `servers` on.
pub fn waits(servers: u32, load: f64) -> f64 {
    let c = f64::from(servers);
    if load >= c {
        return 1.0;
    }
    // Erlang's B, of c servers from that of c - 1.
    let blocked = (1..=servers).fold(1.0, |blocked, k| load * blocked / (f64::from(k) + load * blocked));
    blocked / (1.0 - load / c * (1.0 - blocked))
}

/// The wait that a share `percentile` of the work does not exceed; infinite if the servers cannot keep up.
pub fn wait(servers: u32, load: f64, service: f64, percentile: f64) -> f64 {
    let spare = f64::from(servers) - load;
    if spare <= 0.0 {
        return f64::INFINITY;
    }
    let waits = waits(servers, load);
    match waits > 1.0 - percentile {
        true => service / spare * (waits / (1.0 - percentile)).ln(),
        false => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_server_is_the_textbooks() {
        // M/M/1: the probability to wait is the load.
        assert!((waits(1, 0.7) - 0.7).abs() < 1e-12);
        // P(W > t) = 0.5 e^(-0.5 t): a tenth at t = 2 ln 5.
        assert!((wait(1, 0.5, 1.0, 0.9) - 2.0 * 5f64.ln()).abs() < 1e-12);
    }

    #[test]
    fn two_servers_by_hand() {
        // Load 1 on 2: B = 0.2, C = 0.2 / (1 - 0.5 · 0.8) = 1/3.
        assert!((waits(2, 1.0) - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(wait(2, 1.0, 1.0, 0.5), 0.0);
        assert_eq!((waits(2, 2.0), wait(2, 2.5, 1.0, 0.5)), (1.0, f64::INFINITY));
    }

    #[test]
    fn more_servers_wait_less() {
        let waits: Vec<f64> = (4..40).map(|servers| wait(servers, 3.7, 0.2, 0.99)).collect();
        assert!(waits.windows(2).all(|pair| pair[1] <= pair[0]));
    }
}
