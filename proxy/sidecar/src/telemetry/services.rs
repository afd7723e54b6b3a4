//! What is counted by Service and happens rarely: ejections, copies of requests.

use std::{collections::HashMap, hash::Hash};

use parking_lot::Mutex;
use turnpike_rules::ServiceKey;

use super::labels::Pair;
use crate::observe::Mirrored;

/// Services that are counted by name. Past it all others are counted under [`OTHERS`].
const MAX_SERVICES: usize = 500;
const OTHERS: &str = "overflow";

#[derive(Debug, Default)]
pub(super) struct Services {
    ejections: Mutex<HashMap<String, Ejections>>,
    mirrored: Mutex<HashMap<(String, Mirrored), u64>>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Ejections {
    total: u64,
    out: u64,
}

impl Services {
    pub(super) fn ejected(&self, service: &ServiceKey) {
        entry(&mut self.ejections.lock(), name(service), OTHERS.into()).total += 1;
    }

    pub(super) fn out(&self, service: &ServiceKey, endpoints: usize) {
        let mut ejections = self.ejections.lock();
        // A sum over the others cannot be kept by telling new values.
        if let Some(known) = ejections.get_mut(&name(service)) {
            known.out = endpoints as u64;
        }
    }

    pub(super) fn mirrored(&self, service: &ServiceKey, copy: Mirrored) {
        let mut mirrored = self.mirrored.lock();
        *entry(&mut mirrored, (name(service), copy), (OTHERS.into(), copy)) += 1;
    }

    pub(super) fn ejection_series(&self) -> Vec<(Vec<Pair>, u64)> {
        let ejections = self.ejections.lock();
        let series = ejections.iter();
        series
            .map(|(service, each)| (labelled(service), each.total))
            .collect()
    }

    pub(super) fn out_series(&self) -> Vec<(Vec<Pair>, u64)> {
        let ejections = self.ejections.lock();
        let series = ejections.iter().filter(|(service, _)| *service != OTHERS);
        series
            .map(|(service, each)| (labelled(service), each.out))
            .collect()
    }

    pub(super) fn mirrored_series(&self) -> Vec<(Vec<Pair>, u64)> {
        let mirrored = self.mirrored.lock();
        let series = mirrored.iter().map(|((service, copy), count)| {
            let mut labels = labelled(service);
            labels.push(("result", copy.as_str().to_owned()));
            (labels, *count)
        });
        series.collect()
    }
}

/// The value under `key`, or under `others` where there are too many.
fn entry<K: Hash + Eq, V: Default>(map: &mut HashMap<K, V>, key: K, others: K) -> &mut V {
    let full = map.len() >= MAX_SERVICES && !map.contains_key(&key);
    map.entry(if full { others } else { key }).or_default()
}

fn name(service: &ServiceKey) -> String {
    format!("{}.{}", service.name, service.namespace)
}

fn labelled(service: &str) -> Vec<Pair> {
    vec![("service", service.to_owned())]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_bounded_and_nothing_is_lost() {
        let services = Services::default();
        let total = MAX_SERVICES + 50;
        for n in 0..total {
            let key = ServiceKey::new("cluster", "shop", format!("s{n}").as_str());
            services.ejected(&key);
            services.out(&key, 1);
            services.mirrored(&key, Mirrored::Failed);
        }
        for series in [services.ejection_series(), services.mirrored_series()] {
            assert_eq!(series.len(), MAX_SERVICES + 1);
            assert_eq!(
                series.iter().map(|(_, count)| count).sum::<u64>(),
                total as u64
            );
        }
        let out = services.out_series();
        assert!(out.len() == MAX_SERVICES && out.iter().all(|(_, out)| *out == 1));
    }
}
