//! What does not work now, for logs and pages.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;

use crate::Impairment;

/// Clones share the list: each part that talks to the API keeps its own entries in it. Bounded by
/// the number of parts.
#[derive(Clone, Debug, Default)]
pub struct Impairments(Arc<Mutex<BTreeMap<String, Impairment>>>);

impl Impairments {
    /// Says what is wrong with a part, or with `None` that nothing is. Logged when it changes.
    pub fn set(&self, what: &str, found: Option<Impairment>) {
        let mut all = self.0.lock();
        if all.get(what) == found.as_ref() {
            return;
        }
        let before = match found {
            Some(found) => {
                tracing::warn!("{found}");
                all.insert(what.to_owned(), found);
                None
            }
            None => all.remove(what),
        };
        if let Some(before) = before {
            tracing::info!("over: {before}");
        }
    }

    pub fn all(&self) -> Vec<Impairment> {
        self.0.lock().values().cloned().collect()
    }

    /// Those without which nothing can be served.
    pub fn blocking(&self) -> Vec<Impairment> {
        let all = self.0.lock();
        all.values().filter(|i| i.blocking).cloned().collect()
    }
}
