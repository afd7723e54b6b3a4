//! Metrics under the AWS CNI's names, so that its dashboards work.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use turnpike_ipam::Counts;

/// Counters too are of this type: the names that people chart have no `_total`.
type Number = Gauge<u64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Call {
    pub api: &'static str,
    pub error: &'static str,
}

#[derive(Clone, Debug, Default)]
pub struct Metrics {
    pub adds: Number,
    pub dels: Number,
    pub errors: Number,
    pub no_address: Number,
    pub reconciles: Number,
    pub actions: Number,
    pub api_calls: Family<Api, Number>,
    pub api_errors: Family<Call, Number>,
    pub denied_packets: Number,
    pub add_seconds: Seconds,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct Api {
    pub api: &'static str,
}

/// From a warm ADD's few milliseconds to the longest wait.
#[derive(Clone, Debug)]
pub struct Seconds(pub Histogram);

impl Default for Seconds {
    fn default() -> Self {
        let bounds = [
            0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
        ];
        Self(Histogram::new(bounds))
    }
}

impl Metrics {
    /// The text that a scrape gets.
    pub fn scrape(&self, pool: Counts) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix("awscni");
        let mut number = |name: &str, help: &str, value: u64| {
            let gauge = Number::default();
            gauge.set(value);
            registry.register(name, help, gauge);
        };
        number("eni_allocated", "Network interfaces held", pool.enis.into());
        number(
            "eni_max",
            "Network interfaces that the instance can hold",
            pool.max_enis.into(),
        );
        number(
            "ip_max",
            "Pod addresses that the instance can hold",
            pool.max_addresses.into(),
        );
        number(
            "total_ip_addresses",
            "Pod addresses held",
            pool.total.into(),
        );
        number(
            "assigned_ip_addresses",
            "Addresses that pods have",
            pool.leased.into(),
        );
        number(
            "allocatable_ip_addresses",
            "Addresses for the next pods",
            pool.allocatable.into(),
        );
        number(
            "cooling_ip_addresses",
            "Released, not for the next pod yet",
            pool.cooling.into(),
        );
        number("total_ipv4_prefixes", "Prefixes held", 0);
        self.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry)?;
        Ok(text)
    }

    fn register(&self, registry: &mut Registry) {
        let Self {
            adds,
            dels,
            errors,
            no_address,
            reconciles,
            actions,
            api_calls,
            api_errors,
            denied_packets,
            add_seconds,
        } = self.clone();
        registry.register("add_ip_req_count", "ADD requests", adds);
        registry.register("del_ip_req_count", "DEL requests", dels);
        registry.register("ipamd_error_count", "Operations that failed", errors);
        registry.register(
            "no_available_ip_addresses",
            "ADDs that found no address",
            no_address,
        );
        registry.register("reconcile_count", "Looks at EC2", reconciles);
        registry.register("ipamd_action_inprogress", "Calls to EC2 under way", actions);
        registry.register("ec2api_req_count", "Calls to EC2", api_calls);
        registry.register("ec2api_error_count", "Calls to EC2 that failed", api_errors);
        registry.register(
            "denied_packets",
            "Packets that the node's rules refused",
            denied_packets,
        );
        let seconds = Unit::Seconds;
        registry.register_with_unit("add_duration", "Time of an ADD", seconds, add_seconds.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_the_ones_that_dashboards_ask_for() {
        let metrics = Metrics::default();
        metrics.adds.inc();
        let text = metrics
            .scrape(Counts {
                total: 9,
                ..Counts::default()
            })
            .unwrap();
        for line in [
            "awscni_add_ip_req_count 1",
            "awscni_total_ip_addresses 9",
            "awscni_eni_max 0",
        ] {
            assert!(
                text.lines().any(|it| it == line),
                "{line} is not in\n{text}"
            );
        }
    }
}
