//! A folder of YAML as a source.
//!
//! A thread of the source's own looks at the folder, and:
//!
//! 1. [`files`] finds which of its `*.yaml`, `*.yml` and `*.json` files changed and have settled;
//! 2. [`document`] reads each document of a changed file into an object, or says what is wrong
//!    with which field on which line, with [`yaml`] keeping the positions;
//! 3. [`holdings`] joins all files: which object is in force, which document is refused, and what
//!    changed since last time;
//! 4. the changes go out as events, new objects before deletions, so that nothing is without a
//!    policy while one is renamed.
//!
//! Links are followed, subfolders and hidden files are not read.

mod document;
mod files;
mod holdings;
mod yaml;

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::mpsc;
use turnpike_api::ObjectKey;

use crate::{Event, Place, Source};
use files::Files;
use holdings::Holdings;

/// Between two looks at the folder; a change is in effect after two to three.
const INTERVAL: Duration = Duration::from_millis(20);
/// For large folders the interval grows, so that looking takes at most a twentieth of a CPU.
const SHARE: u32 = 20;
/// When it is full the thread waits for the consumer; nothing is lost, the folder is still there.
const QUEUE: usize = 256;

/// Events from a folder. Its thread ends when this is dropped.
#[derive(Debug)]
pub struct DirectorySource {
    events: mpsc::Receiver<Event>,
    holdings: Arc<Mutex<Holdings>>,
}

impl DirectorySource {
    /// Starts to read `folder`. A folder that does not exist is refused here, since nothing else
    /// would ever be delivered; one that goes away later is reported, and what it held stays.
    pub fn start(folder: impl Into<PathBuf>) -> io::Result<Self> {
        let folder = folder.into();
        if !folder.is_dir() {
            let message = format!("{} is not a folder", folder.display());
            return Err(io::Error::new(io::ErrorKind::NotADirectory, message));
        }
        let (sender, events) = mpsc::channel(QUEUE);
        let holdings = Arc::<Mutex<Holdings>>::default();
        let shared = holdings.clone();
        thread::Builder::new()
            .name("directory".to_owned())
            .spawn(move || watch(&folder, &shared, &sender))?;
        Ok(Self { events, holdings })
    }
}

impl Source for DirectorySource {
    async fn next(&mut self) -> Option<Event> {
        let event = self.events.recv().await;
        if event.is_none() {
            tracing::error!("the thread that reads the folder has ended");
        }
        event
    }

    fn place(&self, object: &ObjectKey) -> Option<Place> {
        self.holdings.lock().place(object)
    }
}

fn watch(folder: &Path, holdings: &Mutex<Holdings>, events: &mpsc::Sender<Event>) {
    let mut files = Files::new(folder);
    let mut synced = false;
    while !events.is_closed() {
        let begin = Instant::now();
        let look = files.look(begin);
        let read = look.changes.into_iter().map(|change| {
            let documents = change.content.map(|text| document::read_all(&text));
            (change.file, documents)
        });
        let read: Vec<_> = read.collect();
        let mut changes = {
            let mut holdings = holdings.lock();
            for (file, documents) in read {
                holdings.replace(file, documents);
            }
            holdings.settle(look.problem)
        };
        if !synced && look.settled {
            changes.push(Event::Synced);
            synced = true;
        }
        for event in changes {
            if events.blocking_send(event).is_err() {
                return;
            }
        }
        thread::sleep(INTERVAL.max(begin.elapsed() * SHARE));
    }
}

#[cfg(test)]
mod tests;
