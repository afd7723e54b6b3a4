//! The access log: one JSON object a line ([`line`]).
//!
//! A worker formats its line and appends it to a buffer; one thread writes the buffer out, a few
//! times a second or when it has grown, so that a request costs neither a system call nor a wait.

mod line;

use std::{
    fmt,
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, SystemTime},
};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use self::line::{write_line, write_refusal};
use crate::observe::{AccessRecord, Refusal};

/// Lines that wait to be written. Full (the reader of stdout is slow): new lines are dropped and
/// counted.
const MAX_BUFFERED: usize = 1024 * 1024;
/// With this much the writer is woken at once.
const WRITE_AT: usize = 64 * 1024;
/// A line waits at most this long.
const WRITE_EVERY: Duration = Duration::from_millis(100);

/// The log; cheap to clone.
#[derive(Clone)]
pub struct AccessLog {
    shared: Arc<Shared>,
    /// Its sender is the writing thread's.
    writer: watch::Receiver<()>,
}

struct Shared {
    buffer: Mutex<Buffer>,
    wake: Condvar,
    written: Condvar,
    dropped: AtomicU64,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    flush: bool,
    writing: bool,
}

impl AccessLog {
    /// Starts the thread that writes to `output`; it lives as long as the process.
    pub fn start(output: impl Write + Send + 'static) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            buffer: Mutex::default(),
            wake: Condvar::new(),
            written: Condvar::new(),
            dropped: AtomicU64::new(0),
        });
        let (writing, writer) = watch::channel(());
        let log = Self {
            shared: shared.clone(),
            writer,
        };
        let run = move || {
            // Dropped when the thread ends, also by a panic.
            let _writing = writing;
            write(&shared, output);
        };
        thread::Builder::new()
            .name("access-log".into())
            .spawn(run)?;
        Ok(log)
    }

    /// Returns when the thread that writes has ended, which it never should.
    pub async fn ended(mut self) {
        while self.writer.changed().await.is_ok() {}
    }

    /// Lines that found no room.
    pub fn dropped(&self) -> u64 {
        self.shared.dropped.load(Relaxed)
    }

    /// Returns when what was logged before is written, or after a second.
    pub fn flush(&self) {
        let mut buffer = self.shared.buffer.lock();
        buffer.flush = true;
        self.shared.wake.notify_one();
        let done = |buffer: &mut Buffer| !buffer.bytes.is_empty() || buffer.writing;
        self.shared
            .written
            .wait_while_for(&mut buffer, done, Duration::from_secs(1));
    }

    pub(super) fn record(&self, record: &AccessRecord<'_>) {
        let now = SystemTime::now();
        self.append(|out| write_line(out, record, now));
    }

    pub(super) fn refused(&self, refusal: &Refusal<'_>) {
        let now = SystemTime::now();
        self.append(|out| write_refusal(out, refusal, now));
    }

    fn append(&self, write: impl FnOnce(&mut Vec<u8>)) {
        // Written where it waits, under the lock: workers meet there for a microsecond at most.
        let mut buffer = self.shared.buffer.lock();
        let before = buffer.bytes.len();
        write(&mut buffer.bytes);
        if buffer.bytes.len() > MAX_BUFFERED {
            buffer.bytes.truncate(before);
            drop(buffer);
            self.shared.dropped.fetch_add(1, Relaxed);
            return;
        }
        // The first line of a batch, and the one that fills it.
        let wake = before == 0 || (before < WRITE_AT && buffer.bytes.len() >= WRITE_AT);
        drop(buffer);
        if wake {
            self.shared.wake.notify_one();
        }
    }
}

impl fmt::Debug for AccessLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AccessLog({} dropped)", self.dropped())
    }
}

fn write(shared: &Shared, mut output: impl Write) {
    let mut lines = Vec::new();
    loop {
        {
            let mut buffer = shared.buffer.lock();
            while buffer.bytes.is_empty() && !buffer.flush {
                shared.wake.wait(&mut buffer);
            }
            let more = |buffer: &mut Buffer| buffer.bytes.len() < WRITE_AT && !buffer.flush;
            shared.wake.wait_while_for(&mut buffer, more, WRITE_EVERY);
            buffer.flush = false;
            buffer.writing = true;
            std::mem::swap(&mut buffer.bytes, &mut lines);
        }
        if !lines.is_empty() {
            // Nobody reads: there is no better place to complain to.
            let _ = output.write_all(&lines).and_then(|()| output.flush());
            lines.clear();
            lines.shrink_to(WRITE_AT);
        }
        shared.buffer.lock().writing = false;
        shared.written.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use serde_json::Value;

    use super::{line::tests::record, *};

    /// Output that the test reads, or holds up.
    struct Pipe {
        written: Arc<Mutex<Vec<u8>>>,
        gate: Option<mpsc::Receiver<()>>,
    }

    impl Write for Pipe {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            if let Some(gate) = &self.gate {
                let _ = gate.recv();
            }
            self.written.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    fn log(gate: Option<mpsc::Receiver<()>>) -> (AccessLog, Arc<Mutex<Vec<u8>>>) {
        let written = Arc::new(Mutex::new(Vec::new()));
        let log = AccessLog::start(Pipe {
            written: written.clone(),
            gate,
        })
        .unwrap();
        (log, written)
    }

    fn lines(written: &Mutex<Vec<u8>>) -> Vec<Value> {
        let bytes = written.lock();
        let text = std::str::from_utf8(&bytes).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    }

    #[test]
    fn a_reader_that_stalls_costs_lines_not_memory() {
        let (release, gate) = mpsc::channel();
        let (log, written) = log(Some(gate));
        let each = {
            let mut line = Vec::new();
            write_line(&mut line, &record(None, None), SystemTime::now());
            line.len()
        };
        // Twice what the buffer and the batch in the writer's hands can take.
        let logged = 4 * MAX_BUFFERED / each;
        for _ in 0..logged {
            log.record(&record(None, None));
        }
        assert!(log.dropped() > 0);
        assert!(log.shared.buffer.lock().bytes.len() <= MAX_BUFFERED);
        drop(release);
        log.flush();
        log.flush();
        let kept = lines(&written).len() as u64;
        assert_eq!(
            kept + log.dropped(),
            logged as u64,
            "each line is written or counted"
        );
    }

    #[tokio::test]
    async fn the_end_of_the_writer_is_noticed() {
        struct Broken;
        impl Write for Broken {
            fn write(&mut self, _: &[u8]) -> std::io::Result<usize> {
                panic!("as if there were a fault in it");
            }
            fn flush(&mut self) -> std::io::Result<()> {
                Ok(())
            }
        }
        let log = AccessLog::start(Broken).unwrap();
        let mut ended = std::pin::pin!(log.clone().ended());
        let patience = Duration::from_millis(50);
        assert!(tokio::time::timeout(patience, &mut ended).await.is_err());
        log.record(&record(None, None));
        let patience = Duration::from_secs(20);
        tokio::time::timeout(patience, ended).await.unwrap();
    }
}
