//! Answers kept until they expire.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;

use super::message::Reply;

/// Two generations: when the young one is full it becomes the old one, and the old one goes. What
/// is asked for moves to the young one, so what is in use stays; memory is bounded by twice `half`.
#[derive(Debug)]
pub struct Cache {
    young: HashMap<(String, RecordType), Kept>,
    old: HashMap<(String, RecordType), Kept>,
    half: usize,
}

#[derive(Clone, Debug)]
struct Kept {
    reply: Reply,
    expires: Instant,
}

impl Cache {
    pub fn new(half: usize) -> Self {
        Self {
            young: HashMap::new(),
            old: HashMap::new(),
            half,
        }
    }

    /// With the TTL that is left.
    pub fn get(&mut self, name: &str, kind: RecordType, now: Instant) -> Option<Reply> {
        let key = (name.to_owned(), kind);
        let kept = match self.young.get(&key) {
            Some(kept) => kept.clone(),
            None => {
                let kept = self.old.remove(&key)?;
                self.insert(key, kept.clone());
                kept
            }
        };
        let left = kept.expires.checked_duration_since(now)?.as_secs();
        let ttl = u32::try_from(left).ok().filter(|ttl| *ttl > 0)?;
        Some(Reply { ttl, ..kept.reply })
    }

    pub fn put(&mut self, name: &str, kind: RecordType, reply: Reply, now: Instant) {
        let expires = now + Duration::from_secs(reply.ttl.into());
        self.insert((name.to_owned(), kind), Kept { reply, expires });
    }

    fn insert(&mut self, key: (String, RecordType), kept: Kept) {
        if self.young.len() >= self.half {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, kept);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_and_expiring() {
        let (mut cache, now) = (Cache::new(10), Instant::now());
        let reply = Reply {
            ttl: 60,
            ..Reply::default()
        };
        for n in 0..1000 {
            cache.put(&format!("n{n}.example"), RecordType::A, reply.clone(), now);
            assert!(
                cache.get("n0.example", RecordType::A, now).is_some(),
                "in use: kept"
            );
        }
        assert!(cache.young.len() + cache.old.len() <= 20);
        let later = now + Duration::from_secs(50);
        assert_eq!(
            cache.get("n0.example", RecordType::A, later).unwrap().ttl,
            10
        );
        let gone = now + Duration::from_secs(61);
        assert!(cache.get("n0.example", RecordType::A, gone).is_none());
    }
}
