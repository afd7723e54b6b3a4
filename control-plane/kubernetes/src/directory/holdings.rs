//! What of all files is in force.
//!
//! An object is in force in its last good version: a bad one is quarantined by itself, an object
//! that is no longer found is kept while its file has a document that cannot be told (it may be
//! that one), and of two definitions the first stays, the second is refused.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use turnpike_api::{Object, ObjectKey};

use super::document::{Document, Fault};
use crate::{Event, Place, Rejection};

#[derive(Debug, Default)]
pub(super) struct Holdings {
    files: BTreeMap<String, Vec<Document>>,
    in_force: HashMap<ObjectKey, Held>,
    rejected: BTreeSet<Rejection>,
}

#[derive(Clone, Debug)]
struct Held {
    object: Object,
    file: String,
    line: usize,
    attachment: Option<(&'static str, usize)>,
}

/// Where an object is defined.
struct Definition<'a> {
    file: &'a str,
    line: usize,
    document: &'a Document,
}

impl Holdings {
    /// What a file holds now; `None`: it is gone.
    pub(super) fn replace(&mut self, file: String, documents: Option<Vec<Document>>) {
        match documents {
            Some(documents) => self.files.insert(file, documents),
            None => self.files.remove(&file),
        };
    }

    /// What changed since last time. `problem` is one with the folder itself.
    pub(super) fn settle(&mut self, problem: Option<String>) -> Vec<Event> {
        let (in_force, mut rejected) = self.judge();
        rejected.extend(problem.map(|message| Rejection {
            file: ".".to_owned(),
            line: None,
            object: None,
            field: None,
            message,
        }));
        let mut events: Vec<Event> = in_force
            .iter()
            .filter(|(key, held)| {
                self.in_force
                    .get(*key)
                    .is_none_or(|before| before.object != held.object)
            })
            .map(|(_, held)| Event::Applied(held.object.clone()))
            .collect();
        let gone = self
            .in_force
            .keys()
            .filter(|key| !in_force.contains_key(*key));
        events.extend(gone.cloned().map(Event::Deleted));
        events.extend(
            self.rejected
                .difference(&rejected)
                .cloned()
                .map(Event::Resolved),
        );
        events.extend(
            rejected
                .difference(&self.rejected)
                .cloned()
                .map(Event::Rejected),
        );
        (self.in_force, self.rejected) = (in_force, rejected);
        events
    }

    /// Where what is in force stands in its file.
    pub(super) fn place(&self, key: &ObjectKey) -> Option<Place> {
        let Held {
            object: _,
            file,
            line,
            attachment,
        } = self.in_force.get(key)?;
        Some(Place {
            file: file.clone(),
            line: attachment.map_or(*line, |(_, line)| line),
            field: attachment.map(|(field, _)| field),
        })
    }

    fn judge(&self) -> (HashMap<ObjectKey, Held>, BTreeSet<Rejection>) {
        let mut in_force = HashMap::new();
        let mut rejected = BTreeSet::new();
        let mut unreadable = BTreeSet::new();
        let mut definitions: BTreeMap<ObjectKey, Vec<Definition<'_>>> = BTreeMap::new();
        for (file, documents) in &self.files {
            for document in documents {
                let (key, line) = match document {
                    Document::Good { object, line, .. } => (Some(object.key()), *line),
                    Document::Bad { key, faults } => {
                        (key.clone(), faults.first().map_or(1, |fault| fault.line))
                    }
                };
                match (key, document) {
                    (Some(key), _) => {
                        let definition = Definition {
                            file,
                            line,
                            document,
                        };
                        definitions.entry(key).or_default().push(definition);
                    }
                    (None, Document::Bad { faults, .. }) => {
                        unreadable.insert(file.as_str());
                        rejected.extend(reject(file, None, faults, "what the file held before"));
                    }
                    (None, Document::Good { .. }) => {}
                }
            }
        }
        for (key, held) in &self.in_force {
            if !definitions.contains_key(key) && unreadable.contains(held.file.as_str()) {
                in_force.insert(key.clone(), held.clone());
            }
        }
        for (key, definitions) in definitions {
            self.judge_one(&key, &definitions, &mut in_force, &mut rejected);
        }
        (in_force, rejected)
    }

    fn judge_one(
        &self,
        key: &ObjectKey,
        definitions: &[Definition<'_>],
        in_force: &mut HashMap<ObjectKey, Held>,
        rejected: &mut BTreeSet<Rejection>,
    ) {
        let before = self.in_force.get(key);
        let owns = |d: &&Definition<'_>| before.is_some_and(|held| held.file == d.file);
        let Some(first) = definitions.iter().find(owns).or(definitions.first()) else {
            return;
        };
        match first.document {
            Document::Good {
                object,
                line,
                attachment,
            } => {
                let held = Held {
                    object: object.clone(),
                    file: first.file.to_owned(),
                    line: *line,
                    attachment: *attachment,
                };
                in_force.insert(key.clone(), held);
            }
            Document::Bad { faults, .. } => {
                let stays = match before {
                    Some(held) => {
                        in_force.insert(key.clone(), held.clone());
                        "its last good version"
                    }
                    None => "",
                };
                rejected.extend(reject(first.file, Some(key), faults, stays));
            }
        }
        let others = definitions.iter().filter(|d| !std::ptr::eq(*d, first));
        rejected.extend(others.map(|other| Rejection {
            file: other.file.to_owned(),
            line: Some(other.line),
            object: Some(key.clone()),
            field: None,
            message: format!(
                "it is defined already, in {} on line {}; that one holds until one of the two is \
                 removed",
                first.file, first.line
            ),
        }));
    }
}

/// `stays`: what is in force instead; empty: nothing.
fn reject(
    file: &str,
    key: Option<&ObjectKey>,
    faults: &[Fault],
    stays: &str,
) -> impl Iterator<Item = Rejection> {
    let rejection = |Fault {
                         line,
                         field,
                         problem,
                     }: &Fault| Rejection {
        file: file.to_owned(),
        line: Some(*line),
        object: key.cloned(),
        field: field.clone(),
        message: match stays {
            "" => format!("{problem} (nothing of it is in force)"),
            stays => format!("{problem} ({stays} stays in force)"),
        },
    };
    faults.iter().map(rejection).collect::<Vec<_>>().into_iter()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::directory::document;

    fn account(name: &str, labels: &str) -> String {
        format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}, labels: \
             {{{labels}}}}}\n---\n"
        )
    }

    fn bad(name: &str) -> String {
        format!("apiVersion: v1\nkind: ServiceAccount\nmetadata: {{name: {name}}}\nnope: 1\n---\n")
    }

    /// Events as `+name`, `-name`, `!file:line`, `~file:line`.
    fn after(holdings: &mut Holdings, changes: &[(&str, Option<String>)]) -> Vec<String> {
        for (file, text) in changes {
            let documents = text.clone().map(|text| document::read_all(&Ok(text)));
            holdings.replace((*file).to_owned(), documents);
        }
        let place = |r: &Rejection| format!("{}:{}", r.file, r.line.unwrap_or(0));
        let mut events: Vec<_> = holdings
            .settle(None)
            .iter()
            .map(|event| match event {
                Event::Applied(object) => format!("+{}", object.key().name),
                Event::Deleted(key) => format!("-{}", key.name),
                Event::Rejected(rejection) => format!("!{}", place(rejection)),
                Event::Resolved(rejection) => format!("~{}", place(rejection)),
                other => unreachable!("{other:?} is the watcher's to say"),
            })
            .collect();
        events.sort();
        events
    }

    #[test]
    fn only_what_changed_is_an_event() {
        let mut all = Holdings::default();
        let two = account("a", "x: '1'") + &account("b", "");
        assert_eq!(after(&mut all, &[("f", Some(two.clone()))]), ["+a", "+b"]);
        assert!(after(&mut all, &[("f", Some(two))]).is_empty());
        let changed = account("a", "x: '2'") + &account("b", "");
        assert_eq!(after(&mut all, &[("f", Some(changed))]), ["+a"]);
        assert_eq!(after(&mut all, &[("f", Some(account("b", "")))]), ["-a"]);
        assert_eq!(after(&mut all, &[("f", None)]), ["-b"]);
    }

    #[test]
    fn a_bad_version_leaves_the_last_good_one() {
        let mut all = Holdings::default();
        after(
            &mut all,
            &[("f", Some(account("a", "") + &account("b", "")))],
        );
        assert_eq!(
            after(&mut all, &[("f", Some(bad("a") + &account("b", "y: z")))]),
            ["!f:4", "+b"]
        );
        assert_eq!(
            after(
                &mut all,
                &[("f", Some(account("a", "n: 'w'") + &account("b", "y: z")))]
            ),
            ["+a", "~f:4"]
        );
        assert_eq!(
            after(&mut all, &[("f", Some(bad("new")))]),
            ["!f:4", "-a", "-b"]
        );
    }

    #[test]
    fn what_cannot_be_told_may_be_any_of_the_files_objects() {
        let mut all = Holdings::default();
        after(
            &mut all,
            &[("f", Some(account("a", ""))), ("g", Some(account("b", "")))],
        );
        assert_eq!(after(&mut all, &[("f", Some("a: [".to_owned()))]), ["!f:1"]);
        assert_eq!(after(&mut all, &[("g", None)]), ["-b"], "another file");
        assert_eq!(
            after(&mut all, &[("f", Some(account("c", "")))]),
            ["+c", "-a", "~f:1"]
        );
    }

    #[test]
    fn the_second_definition_is_refused_until_the_first_goes() {
        let mut all = Holdings::default();
        let (one, two) = (account("a", "v: one"), account("a", "v: two"));
        assert_eq!(after(&mut all, &[("m", Some(one.clone()))]), ["+a"]);
        assert_eq!(
            after(&mut all, &[("b", Some(two.clone()))]),
            ["!b:1"],
            "though b is before m"
        );
        assert_eq!(after(&mut all, &[("m", None)]), ["+a", "~b:1"]);
        let twice = two.clone() + &one;
        assert_eq!(
            after(&mut all, &[("b", Some(twice))]),
            ["!b:5"],
            "in one file too"
        );
        assert_eq!(
            after(&mut all, &[("b", None), ("c", Some(two))]),
            ["~b:5"],
            "moved"
        );
    }

    #[test]
    fn a_policy_stands_where_it_says_what_it_is_about() {
        let mut all = Holdings::default();
        let policy = "apiVersion: turnpike.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {name: t}\n\
                      spec:\n  timeouts: {request: 1s}\n  targetRefs:\n  - {kind: Service, name: web}\n";
        let text = account("a", "") + policy;
        after(&mut all, &[("f", Some(text.clone()))]);
        let key = |kind, name| ObjectKey::new(kind, "default", name);
        let policy = key(turnpike_api::Kind::TrafficPolicy, "t");
        let place = |line, field| {
            Some(Place {
                file: "f".to_owned(),
                line,
                field,
            })
        };
        assert_eq!(all.place(&policy), place(10, Some("spec.targetRefs")));
        let account = key(turnpike_api::Kind::ServiceAccount, "a");
        assert_eq!(all.place(&account), place(1, None));
        // Moved within its file, it is no other object.
        assert!(after(&mut all, &[("f", Some(format!("\n{text}")))]).is_empty());
        assert_eq!(all.place(&policy), place(11, Some("spec.targetRefs")));
    }

    #[test]
    fn a_message_says_what_stays() {
        let mut all = Holdings::default();
        after(&mut all, &[("f", Some(account("a", "")))]);
        all.replace("f".to_owned(), Some(document::read_all(&Ok(bad("a")))));
        let [Event::Rejected(rejection)] = &all.settle(None)[..] else {
            panic!("one rejection")
        };
        assert_eq!(
            rejection.to_string(),
            "f:4: ServiceAccount default/a: nope: unknown field; allowed are apiVersion, \
             automountServiceAccountToken, imagePullSecrets, kind, metadata, secrets (its last \
             good version stays in force)"
        );
    }
}
