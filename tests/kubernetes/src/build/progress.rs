//! How far a build is: on a terminal a line that moves, elsewhere a line every half minute.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

const BETWEEN_LINES: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Progress {
    name: &'static str,
    expected: Duration,
    begun: Instant,
    told: Instant,
    bar: Option<ProgressBar>,
}

impl Progress {
    /// `expected` is what a cold build of it takes two cores.
    pub(super) fn begin(name: &'static str, expected: Duration) -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new_spinner();
            let style = ProgressStyle::with_template(
                "{spinner:.cyan} {prefix:.bold} {elapsed} {wide_msg:.dim}",
            );
            if let Ok(style) = style {
                bar.set_style(style);
            }
            bar.set_prefix(name);
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let now = Instant::now();
        let progress = Self {
            name,
            expected,
            begun: now,
            told: now,
            bar,
        };
        progress.show("starting");
        progress
    }

    /// The toolchain named what it is at.
    pub(super) fn says(&mut self, line: &str) {
        if self.bar.is_some() {
            self.show(line);
        } else if self.told.elapsed() > BETWEEN_LINES {
            self.told = Instant::now();
            self.show(line);
        }
    }

    fn show(&self, line: &str) {
        let expected = short(self.expected);
        match &self.bar {
            Some(bar) => bar.set_message(format!("of about {expected} · {line}")),
            None => eprintln!(
                "  {} {} of about {expected} · {line}",
                self.name,
                short(self.begun.elapsed())
            ),
        }
    }

    pub(super) fn end(self, made: bool) {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        let mark = if made { "✓" } else { "✗" };
        eprintln!("  {mark} {} · {}", self.name, short(self.begun.elapsed()));
    }
}

fn short(time: Duration) -> String {
    let seconds = time.as_secs();
    if seconds < 90 {
        format!("{seconds} s")
    } else {
        format!("{} min", seconds.div_ceil(60))
    }
}
