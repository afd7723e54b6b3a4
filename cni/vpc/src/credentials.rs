//! Temporary credentials: the metadata service hands them out, the API asks for them.

use std::{collections::BTreeMap, time::Duration};

use parking_lot::Mutex;

use crate::world::{InstanceId, Now};

/// How long a set is good for, and how long before its end the next one is handed out.
const LIFETIME: Duration = Duration::from_hours(6);
const RENEWAL: Duration = Duration::from_hours(1);

#[derive(Clone)]
pub(crate) struct Temporary {
    pub(crate) access_key: String,
    pub(crate) secret: String,
    pub(crate) token: String,
    pub(crate) issued: Now,
    pub(crate) expires: Now,
}

/// Keeps secrets out of logs.
impl std::fmt::Debug for Temporary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Temporary")
            .field("access_key", &self.access_key)
            .finish_non_exhaustive()
    }
}

#[derive(Debug, Default)]
pub(crate) struct Issuer {
    /// The newest two of each instance: a client may still sign with the one before.
    issued: Mutex<BTreeMap<InstanceId, Vec<Temporary>>>,
}

impl Issuer {
    /// The instance's current set.
    pub(crate) fn issue(&self, instance: &InstanceId, now: Now) -> Temporary {
        let mut issued = self.issued.lock();
        let sets = issued.entry(instance.clone()).or_default();
        if let Some(current) = sets.last().filter(|set| now + RENEWAL < set.expires) {
            return current.clone();
        }
        let fresh = Temporary {
            access_key: format!("ASIA{}", upper(16)),
            secret: format!("{}{}", upper(20), upper(20).to_lowercase()),
            token: format!("box/{}", uuid::Uuid::new_v4().simple()),
            issued: now,
            expires: now + LIFETIME,
        };
        sets.push(fresh.clone());
        if sets.len() > 2 {
            sets.remove(0);
        }
        fresh
    }

    /// Whether this key and session token were handed out and are still good.
    pub(crate) fn accepts(&self, access_key: &str, token: &str, now: Now) -> bool {
        let issued = self.issued.lock();
        let mut all = issued.values().flatten();
        all.any(|set| set.access_key == access_key && set.token == token && now < set.expires)
    }
}

fn upper(length: usize) -> String {
    std::iter::repeat_with(|| fastrand::alphanumeric().to_ascii_uppercase())
        .take(length)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_is_kept_until_it_nears_its_end_and_accepted_until_it() {
        let issuer = Issuer::default();
        let instance = InstanceId::from("i-1");
        let first = issuer.issue(&instance, Now::ZERO);
        assert_eq!(
            issuer.issue(&instance, RENEWAL).access_key,
            first.access_key
        );
        let second = issuer.issue(&instance, LIFETIME - RENEWAL);
        assert_ne!(second.access_key, first.access_key);
        let before_end = LIFETIME.checked_sub(Duration::from_secs(1)).unwrap();
        assert!(issuer.accepts(&first.access_key, &first.token, before_end));
        assert!(!issuer.accepts(&first.access_key, &first.token, LIFETIME));
        assert!(!issuer.accepts(&first.access_key, &second.token, before_end));
        assert!(!issuer.accepts("AKIAIOSFODNN7EXAMPLE", "", before_end));
        assert!(!format!("{first:?}").contains(&first.secret));
    }
}
