//! Which files changed, once they have settled.
//!
//! A file that is being written is seen truncated, and one that an editor replaces is gone for a
//! moment. So a change counts only when two looks in a row find the same, and a file that was
//! emptied only after a second, since that is how most writes begin; what was read before stays
//! until then. Whoever writes large files slowly should write them under another name and rename.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant, SystemTime},
};

/// No object in Kubernetes is larger than 1.5 MiB; a file may have many.
const MAX_SIZE: u64 = 16 << 20;

/// How long a file must be empty to be believed.
const EMPTIED: Duration = Duration::from_secs(1);

/// The folder, as it was found last.
#[derive(Debug)]
pub(super) struct Files {
    folder: PathBuf,
    known: BTreeMap<String, Known>,
}

#[derive(Debug)]
struct Known {
    /// What the last look found; `None`: nothing.
    seen: Option<Stamp>,
    /// When it was first found so.
    since: Instant,
    /// What was read, and reported. `None`: nothing yet.
    read: Option<(Stamp, Content)>,
}

/// Changes when a file does. Times are coarse on some file systems, so that a rewrite of the same
/// length within one tick may go unseen; the inode shows files that are put in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    modified: Option<SystemTime>,
    size: u64,
    inode: u64,
}

/// The text of a file, or why it cannot be read.
pub(super) type Content = Result<String, String>;

/// What one look found.
#[derive(Debug, Default)]
pub(super) struct Look {
    pub(super) changes: Vec<Change>,
    /// The folder itself cannot be read; what it held is not touched.
    pub(super) problem: Option<String>,
    /// No file is waiting for a second look.
    pub(super) settled: bool,
}

#[derive(Debug)]
pub(super) struct Change {
    pub(super) file: String,
    /// `None`: it is gone.
    pub(super) content: Option<Content>,
}

impl Files {
    pub(super) fn new(folder: &Path) -> Self {
        Self {
            folder: folder.to_owned(),
            known: BTreeMap::new(),
        }
    }

    pub(super) fn look(&mut self, now: Instant) -> Look {
        let found = match list(&self.folder) {
            Ok(Some(found)) => found,
            Ok(None) => return Look::default(),
            Err(error) => {
                let problem = format!(
                    "the folder cannot be read: {error}; what was read from it stays in force"
                );
                return Look {
                    problem: Some(problem),
                    ..Look::default()
                };
            }
        };
        for file in found.keys() {
            self.known.entry(file.clone()).or_insert(Known {
                seen: None,
                since: now,
                read: None,
            });
        }
        let mut look = Look {
            settled: true,
            ..Look::default()
        };
        for (file, known) in &mut self.known {
            let stamp = found.get(file).copied();
            if stamp != known.seen {
                (known.seen, known.since) = (stamp, now);
                look.settled = false;
                continue;
            }
            if known.read.as_ref().map(|(stamp, _)| *stamp) == stamp {
                continue;
            }
            let content = match stamp {
                Some(stamp) if known.emptied(stamp, now) => None,
                Some(stamp) => read(&self.folder.join(file), stamp).map(Some),
                None => Some(None),
            };
            let Some(content) = content else {
                look.settled = false;
                continue;
            };
            let same = known.read.as_ref().map(|(_, content)| content) == content.as_ref();
            known.read = stamp.zip(content.clone());
            if !same {
                look.changes.push(Change {
                    file: file.clone(),
                    content,
                });
            }
        }
        self.known
            .retain(|_, known| known.seen.is_some() || known.read.is_some());
        look
    }
}

impl Known {
    /// Whether it had content, and has had none for too short a time.
    fn emptied(&self, stamp: Stamp, now: Instant) -> bool {
        let had_content = self
            .read
            .as_ref()
            .is_some_and(|(before, _)| before.size > 0);
        stamp.size == 0 && had_content && now.duration_since(self.since) < EMPTIED
    }
}

/// `None`: a file went away meanwhile, and may stand under a name that was not there yet. Look again.
fn list(folder: &Path) -> io::Result<Option<BTreeMap<String, Stamp>>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let Ok(name) = entry.file_name().into_string() else {
            continue;
        };
        let extension = Path::new(&name).extension().and_then(|e| e.to_str());
        if name.starts_with('.') || !matches!(extension, Some("yaml" | "yml" | "json")) {
            continue;
        }
        let (path, kind) = (folder.join(&name), entry.file_type()?);
        match stamp(&path) {
            Some(stamp) => drop(found.insert(name, stamp)),
            None if kind.is_file() => return Ok(None),
            None if kind.is_symlink() && fs::symlink_metadata(&path).is_err() => return Ok(None),
            // A folder, or a link to nothing.
            None => {}
        }
    }
    Ok(Some(found))
}

fn stamp(path: &Path) -> Option<Stamp> {
    use std::os::unix::fs::MetadataExt as _;
    let metadata = fs::metadata(path).ok().filter(fs::Metadata::is_file)?;
    let (modified, size) = (metadata.modified().ok(), metadata.len());
    Some(Stamp {
        modified,
        size,
        inode: metadata.ino(),
    })
}

/// `None`: it changed meanwhile, look again.
fn read(path: &Path, before: Stamp) -> Option<Content> {
    if before.size > MAX_SIZE {
        return Some(Err(format!(
            "it has {} bytes; allowed are {MAX_SIZE}",
            before.size
        )));
    }
    let bytes = fs::read(path);
    if stamp(path) != Some(before) {
        return None;
    }
    Some(match bytes {
        Ok(bytes) => String::from_utf8(bytes).map_err(|error| {
            format!(
                "it is not UTF-8 at byte {}",
                error.utf8_error().valid_up_to()
            )
        }),
        Err(error) => Err(format!("it cannot be read: {error}")),
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

    use super::*;

    #[test]
    fn a_file_under_another_name_is_not_gone() {
        let folder = tempfile::tempdir().unwrap();
        let [a, b] = ["a.yaml", "b.yaml"].map(|name| folder.path().join(name));
        fs::write(&a, "x").unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !done.load(Relaxed) {
                    fs::rename(&a, &b).unwrap();
                    fs::rename(&b, &a).unwrap();
                }
            });
            let mut looks = (0..5000).filter_map(|_| list(folder.path()).unwrap());
            let gone = looks.any(|found| found.is_empty());
            done.store(true, Relaxed);
            assert!(!gone, "it stood under one of them all the time");
        });
    }

    #[test]
    fn a_change_counts_when_it_has_settled() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        let mut files = Files::new(folder.path());
        let begin = Instant::now();
        let mut look = |seconds: u64| {
            let look = files.look(begin + Duration::from_secs(seconds));
            let change = |c: Change| c.content.map(|content| content.unwrap());
            (
                look.settled,
                look.changes.into_iter().map(change).collect::<Vec<_>>(),
            )
        };
        let text = |text: &str| Some(text.to_owned());

        assert_eq!(look(0), (true, vec![]));
        fs::write(&path, "one").unwrap();
        assert_eq!(look(0), (false, vec![]), "first seen");
        assert_eq!(look(0), (true, vec![text("one")]));
        assert_eq!(look(0), (true, vec![]));

        fs::write(&path, "").unwrap();
        assert_eq!(look(10), (false, vec![]));
        assert_eq!(
            look(10),
            (false, vec![]),
            "it may be a write that has begun"
        );
        fs::write(&path, "three").unwrap();
        assert_eq!(look(20), (false, vec![]));
        assert_eq!(look(20), (true, vec![text("three")]));

        fs::write(&path, "").unwrap();
        assert_eq!(look(30), (false, vec![]));
        assert_eq!(look(31), (true, vec![text("")]), "it is meant");

        fs::remove_file(&path).unwrap();
        assert_eq!(look(40), (false, vec![]), "an editor may put it back");
        assert_eq!(look(40), (true, vec![None]));
        assert_eq!(look(40), (true, vec![]));
    }

    #[test]
    fn a_file_written_anew_with_the_same_text_is_no_change() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.yaml");
        fs::write(&path, "one").unwrap();
        let mut files = Files::new(folder.path());
        let now = Instant::now();
        files.look(now);
        assert_eq!(files.look(now).changes.len(), 1);
        fs::write(folder.path().join("new"), "one").unwrap();
        fs::rename(folder.path().join("new"), &path).unwrap();
        assert!(files.look(now).changes.is_empty());
        assert!(files.look(now).changes.is_empty());
    }
}
