//! The record of what was issued, one JSON line a certificate, on disk before the answer leaves.
//!
//! One thread writes. Entries that arrive while it syncs are written together and share the next
//! sync. A line that could not be written whole is cut off again, so that a full disk leaves no
//! torn line; one that a power cut tore is closed at the next start.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Seek, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    thread::JoinHandle,
};

use serde::Serialize;
use tokio::sync::{mpsc, oneshot};

/// One issued certificate.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Entry {
    pub(crate) issued: String,
    pub(crate) serial: String,
    pub(crate) identity: String,
    pub(crate) pod: Option<String>,
    pub(crate) pod_uid: Option<String>,
    pub(crate) node: Option<String>,
    pub(crate) not_after: String,
}

#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum JournalError {
    #[error("the record of issued certificates cannot be written: {0}")]
    Write(String),
    #[error("the record of issued certificates is closed")]
    Closed,
}

/// Hands entries to the writer.
#[derive(Debug)]
pub struct Journal {
    entries: Option<mpsc::Sender<Waiting>>,
    writer: Option<JoinHandle<()>>,
}

struct Waiting {
    line: Vec<u8>,
    done: oneshot::Sender<Result<(), JournalError>>,
}

impl Journal {
    /// Entries that wait for the disk; when as many wait, further requests wait for room.
    const QUEUE: usize = 256;

    /// Starts the writer. A file that cannot be opened fails the entries, not the start.
    pub fn start(path: &Path) -> io::Result<Self> {
        let opened = open(path).inspect_err(|error| {
            tracing::error!(path = %path.display(), %error, "nothing can be issued until it opens");
        });
        let mut file = Lines {
            path: path.to_owned(),
            file: opened.ok(),
        };
        let (entries, mut waiting) = mpsc::channel::<Waiting>(Self::QUEUE);
        let writer = std::thread::Builder::new()
            .name("issuance".into())
            .spawn(move || {
                let mut batch = Vec::new();
                while waiting.blocking_recv_many(&mut batch, Self::QUEUE) > 0 {
                    let lines: Vec<u8> =
                        batch.iter().flat_map(|w| w.line.iter().copied()).collect();
                    let result = file.append(&lines);
                    let result = result.map_err(|error| JournalError::Write(error.to_string()));
                    for Waiting { done, .. } in batch.drain(..) {
                        // Whoever asked has gone; the record stays.
                        let _ = done.send(result.clone());
                    }
                }
            })?;
        Ok(Self {
            entries: Some(entries),
            writer: Some(writer),
        })
    }

    /// Returns when the entry is on disk.
    pub(crate) async fn record(&self, entry: &Entry) -> Result<(), JournalError> {
        let mut line =
            serde_json::to_vec(entry).map_err(|error| JournalError::Write(error.to_string()))?;
        line.push(b'\n');
        let (done, result) = oneshot::channel();
        let entries = self.entries.as_ref().ok_or(JournalError::Closed)?;
        entries
            .send(Waiting { line, done })
            .await
            .map_err(|_| JournalError::Closed)?;
        result.await.map_err(|_| JournalError::Closed)?
    }
}

impl Drop for Journal {
    /// What was handed over is written.
    fn drop(&mut self) {
        self.entries.take();
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

/// A file that always ends with a whole line. It is opened when it is needed, and again after an
/// error: a disk that was full need not stay so.
struct Lines {
    path: PathBuf,
    /// With its length.
    file: Option<(File, u64)>,
}

impl Lines {
    fn append(&mut self, bytes: &[u8]) -> io::Result<()> {
        let (mut file, length) = match self.file.take() {
            Some(open) => open,
            None => open(&self.path)?,
        };
        match write(&mut file, bytes) {
            Ok(()) => self.file = Some((file, length + bytes.len() as u64)),
            Err(error) => {
                // Where this fails too, the torn line is closed when the file is opened again.
                let _ = file.set_len(length);
                return Err(error);
            }
        }
        Ok(())
    }
}

fn open(path: &Path) -> io::Result<(File, u64)> {
    let new = !path.exists();
    let mut file = OpenOptions::new()
        .read(true)
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)?;
    if new && let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    let mut length = file.metadata()?.len();
    if length > 0 {
        let mut last = [0];
        file.seek(SeekFrom::Start(length - 1))?;
        file.read_exact(&mut last)?;
        if last != [b'\n'] {
            tracing::warn!(path = %path.display(), "the last line is torn; it is kept");
            write(&mut file, b"\n")?;
            length += 1;
        }
    }
    Ok((file, length))
}

fn write(file: &mut File, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(serial: &str) -> Entry {
        Entry {
            issued: "2026-01-01T00:00:00Z".into(),
            serial: serial.into(),
            identity: "spiffe://cluster.local/ns/a/sa/b".into(),
            pod: None,
            pod_uid: None,
            node: None,
            not_after: "2026-01-02T00:00:00Z".into(),
        }
    }

    fn serials(path: &Path) -> Vec<String> {
        let text = std::fs::read_to_string(path).unwrap();
        let parse = |line: &str| serde_json::from_str::<serde_json::Value>(line).ok();
        let entries = text.lines().filter_map(parse);
        entries
            .map(|entry| entry["serial"].as_str().unwrap().to_owned())
            .collect()
    }

    #[tokio::test]
    async fn entries_are_on_disk_when_it_returns_and_a_torn_line_is_closed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("issued.jsonl");
        let journal = Journal::start(&path).unwrap();
        let all = (0..50).map(|n| {
            let journal = &journal;
            async move { journal.record(&entry(&n.to_string())).await }
        });
        assert!(
            futures_util::future::join_all(all)
                .await
                .iter()
                .all(Result::is_ok)
        );
        assert_eq!(serials(&path).len(), 50);
        drop(journal);
        OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"{\"serial\":\"t")
            .unwrap();
        let journal = Journal::start(&path).unwrap();
        journal.record(&entry("after")).await.unwrap();
        assert_eq!(serials(&path).last().unwrap(), "after");
    }

    #[tokio::test]
    async fn a_full_disk_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("issued.jsonl");
        std::os::unix::fs::symlink("/dev/full", &path).unwrap();
        let journal = Journal::start(&path).unwrap();
        let error = journal.record(&entry("1")).await.unwrap_err();
        assert!(error.to_string().contains("No space left"), "{error}");
    }
}
