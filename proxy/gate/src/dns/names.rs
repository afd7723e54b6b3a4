//! The DNS ledger of one pod: which names it was told lead to which address.

use std::{
    collections::HashMap,
    net::IpAddr,
    time::{Duration, Instant},
};

use turnpike_rules::host::HostName;

/// How long after an answer's TTL a new connection may still use it: between a client's answer and
/// its `connect` lie its own queues, other addresses tried first, and retries.
const GRACE: Duration = Duration::from_secs(30);

/// A name that led to an address, and the aliases on the way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolved {
    pub name: HostName,
    pub chain: Vec<String>,
    expires: Instant,
}

/// Bounded: a pod that asks for more than fits gets no further answers until some expire. A live
/// entry is never lost to make room.
#[derive(Debug)]
pub struct Names {
    by_address: HashMap<IpAddr, Vec<Resolved>>,
    entries: usize,
    limit: usize,
}

/// The pod's ledger is full of names that have not expired.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Full;

impl Names {
    pub fn new(limit: usize) -> Self {
        Self {
            by_address: HashMap::new(),
            entries: 0,
            limit,
        }
    }

    /// Notes an answer before it is given. Says whether it told the pod anything new: an answer that
    /// holds for longer is, since after a restart the record alone says so. One from the cache never
    /// does.
    pub fn learn(
        &mut self,
        name: &HostName,
        chain: &[String],
        addresses: &[IpAddr],
        ttl: Duration,
        now: Instant,
    ) -> Result<bool, Full> {
        if self.entries + addresses.len() > self.limit {
            self.forget_expired(now);
        }
        if self.entries + addresses.len() > self.limit {
            return Err(Full);
        }
        let expires = now + ttl + GRACE;
        let mut news = false;
        for address in addresses {
            let known = self.by_address.entry(*address).or_default();
            match known.iter_mut().find(|resolved| resolved.name == *name) {
                Some(resolved) => {
                    news |= expires > resolved.expires || resolved.chain != chain;
                    resolved.expires = resolved.expires.max(expires);
                    resolved.chain = chain.to_vec();
                }
                None => {
                    known.push(Resolved {
                        name: name.clone(),
                        chain: chain.to_vec(),
                        expires,
                    });
                    self.entries += 1;
                    news = true;
                }
            }
        }
        Ok(news)
    }

    /// The names that led to `address` and still do.
    pub fn leading_to(&self, address: IpAddr, now: Instant) -> Vec<Resolved> {
        let known = self.by_address.get(&address).map_or(&[][..], Vec::as_slice);
        known
            .iter()
            .filter(|resolved| resolved.expires >= now)
            .cloned()
            .collect()
    }

    fn forget_expired(&mut self, now: Instant) {
        for known in self.by_address.values_mut() {
            known.retain(|resolved| resolved.expires >= now);
        }
        self.by_address.retain(|_, known| !known.is_empty());
        self.entries = self.by_address.values().map(Vec::len).sum();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> HostName {
        HostName::parse(name).unwrap()
    }

    #[test]
    fn an_answer_counts_until_its_end() {
        let (mut names, now) = (Names::new(10), Instant::now());
        let address = "203.0.113.1".parse().unwrap();
        let minute = Duration::from_secs(60);
        assert_eq!(
            names.learn(&host("a.example"), &[], &[address], minute, now),
            Ok(true)
        );
        assert_eq!(
            names.learn(&host("a.example"), &[], &[address], minute, now),
            Ok(false)
        );
        assert_eq!(names.leading_to(address, now + minute).len(), 1);
        let half_a_second = Duration::from_millis(500);
        assert_eq!(
            names.learn(
                &host("a.example"),
                &[],
                &[address],
                minute - half_a_second,
                now
            ),
            Ok(false),
            "from the cache"
        );
        let again = now + minute - half_a_second;
        assert_eq!(
            names.learn(&host("a.example"), &[], &[address], minute, again),
            Ok(true),
            "a restart must know of it"
        );
        let now = again;
        assert_eq!(names.leading_to(address, now + minute + GRACE + minute), []);
        assert_eq!(names.leading_to("203.0.113.2".parse().unwrap(), now), []);
    }

    #[test]
    fn a_flood_loses_no_live_entry() {
        let (mut names, now) = (Names::new(4), Instant::now());
        let address = |n: u8| IpAddr::from([203, 0, 113, n]);
        let short = Duration::from_secs(1);
        for n in 0..4 {
            names
                .learn(&host("a.example"), &[], &[address(n)], short, now)
                .unwrap();
        }
        let flood: Vec<_> = (10..200).map(address).collect();
        assert_eq!(
            names.learn(&host("b.example"), &[], &flood, short, now),
            Err(Full)
        );
        assert_eq!(names.leading_to(address(0), now).len(), 1);
        let later = now + short + GRACE + short;
        assert_eq!(
            names.learn(&host("b.example"), &[], &flood[..4], short, later),
            Ok(true)
        );
    }
}
