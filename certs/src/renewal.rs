//! When a certificate is renewed.

use std::time::{Duration, SystemTime};

/// The moment to renew a certificate: at half its life, or up to a tenth of its life before that.
///
/// `jitter`, from 0 to 1, spreads the renewals of many workloads that started together; at least
/// half the life is always left for retries.
pub fn renew_at(not_before: SystemTime, not_after: SystemTime, jitter: f64) -> SystemTime {
    let life = not_after
        .duration_since(not_before)
        .unwrap_or(Duration::ZERO);
    let jitter = if jitter.is_finite() {
        jitter.clamp(0.0, 1.0)
    } else {
        0.0
    };
    not_before + life.mul_f64(0.5 - 0.1 * jitter)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    #[test]
    fn half_of_the_life_is_always_left() {
        let start = SystemTime::UNIX_EPOCH + DAY;
        assert_eq!(renew_at(start, start + DAY, 0.0), start + DAY / 2);
        assert_eq!(renew_at(start, start + DAY, 1.0), start + DAY.mul_f64(0.4));
        for jitter in [-1.0, 0.3, 7.0, f64::NAN, f64::INFINITY] {
            let at = renew_at(start, start + DAY, jitter);
            assert!(
                at >= start + DAY.mul_f64(0.4) && at <= start + DAY / 2,
                "{jitter}: {at:?}"
            );
        }
    }

    #[test]
    fn a_certificate_that_ends_before_it_begins_is_renewed_at_once() {
        let start = SystemTime::UNIX_EPOCH + DAY;
        assert_eq!(renew_at(start, start - DAY, 0.5), start);
    }
}
