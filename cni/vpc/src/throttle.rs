//! Token buckets, one for each action, as EC2 throttles an account.

use std::collections::BTreeMap;

use crate::{spec::Throttle, world::Now};

#[derive(Debug, Default)]
pub(crate) struct Buckets {
    /// Tokens left, and when that was true. Only actions that exist get here.
    buckets: BTreeMap<String, (f64, Now)>,
}

impl Buckets {
    /// Takes a token; false when the action has none left.
    pub(crate) fn take(&mut self, action: &str, now: Now, throttle: &Throttle) -> bool {
        let (burst, rate) = if action.starts_with("Describe") {
            (throttle.describe_burst, throttle.describe_per_second)
        } else {
            (throttle.mutate_burst, throttle.mutate_per_second)
        };
        let full = f64::from(burst);
        let (tokens, since) = self.buckets.entry(action.into()).or_insert((full, now));
        let earned = now.saturating_sub(*since).as_secs_f64() * rate;
        *tokens = (*tokens + earned).min(full);
        *since = now;
        let admitted = *tokens >= 1.0;
        if admitted {
            *tokens -= 1.0;
        }
        admitted
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_burst_then_the_rate_each_action_for_itself() {
        let mut buckets = Buckets::default();
        let throttle = Throttle::default();
        let start = Duration::from_secs(9);
        let many = |buckets: &mut Buckets, action, now| {
            (0..200)
                .filter(|_| buckets.take(action, now, &throttle))
                .count()
        };
        assert_eq!(many(&mut buckets, "CreateNetworkInterface", start), 50);
        assert_eq!(many(&mut buckets, "AttachNetworkInterface", start), 50);
        assert_eq!(many(&mut buckets, "DescribeSubnets", start), 100);
        let later = start + Duration::from_secs(2);
        assert_eq!(many(&mut buckets, "CreateNetworkInterface", later), 10);
        assert_eq!(many(&mut buckets, "DescribeSubnets", later), 40);
        let much_later = start + Duration::from_secs(900);
        assert_eq!(many(&mut buckets, "CreateNetworkInterface", much_later), 50);
    }
}
