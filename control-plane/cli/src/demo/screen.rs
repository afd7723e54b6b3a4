//! The demo on a terminal: a line a step while it runs, what held beneath it, figures at the end.

use std::{
    io::IsTerminal as _,
    time::{Duration, Instant},
};

use anyhow::Result;
use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};
use indicatif::{MultiProgress, ProgressBar, ProgressStyle};
use turnpike_rig::{Evidence, World};

use super::Told;

#[derive(Debug)]
pub(super) struct Screen {
    bars: MultiProgress,
    colours: bool,
}

impl Screen {
    pub(super) fn new() -> Self {
        let colours = std::io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self {
            bars: MultiProgress::new(),
            colours,
        }
    }

    pub(super) fn begin(&self, title: &'static str) -> ProgressBar {
        let bar = self.bars.add(ProgressBar::new_spinner());
        let style = ProgressStyle::with_template("{spinner:.cyan} {prefix:.bold} {wide_msg:.dim}");
        if let Ok(style) = style {
            bar.set_style(style);
        }
        bar.set_prefix(title);
        bar.enable_steady_tick(Duration::from_millis(80));
        bar
    }

    pub(super) fn done(&self, bar: &ProgressBar, text: &str, time: Duration) {
        bar.finish_and_clear();
        self.line(&format!(
            "{} {text} · {:.1} s",
            self.paint("32", "✓"),
            time.as_secs_f64()
        ));
    }

    pub(super) fn failed(&self, bar: &ProgressBar, text: &str) {
        bar.finish_and_clear();
        self.line(&format!("{} {text}", self.paint("31", "✗")));
    }

    /// Tells a step and shows what held. One that cannot be told to its end is a claim that did not hold.
    pub(super) fn tell(
        &self,
        number: usize,
        title: &'static str,
        tell: impl FnOnce() -> Result<Evidence>,
    ) -> Told {
        let bar = self.begin(title);
        let begun = Instant::now();
        let evidence = tell().unwrap_or_else(|error| {
            let mut evidence = Evidence::default();
            evidence.claim("the step was told to its end", false, format!("{error:#}"));
            evidence
        });
        let told = Told {
            number,
            title,
            time: begun.elapsed(),
            evidence,
        };
        bar.finish_and_clear();
        self.show(&told);
        told
    }

    fn show(&self, told: &Told) {
        let mark = if told.evidence.held() {
            self.paint("32", "✓")
        } else {
            self.paint("31", "✗")
        };
        let title = self.paint("1", told.title);
        self.line(&format!(
            "\n{mark} {title} · {:.1} s",
            told.time.as_secs_f64()
        ));
        for claim in &told.evidence.claims {
            let mark = if claim.held {
                self.paint("32", "✓")
            } else {
                self.paint("31", "✗")
            };
            let seen: String = claim.seen.trim().chars().take(160).collect();
            self.line(&format!("    {mark} {}", claim.says));
            if !seen.is_empty() {
                self.line(&format!("      {}", self.paint("2", &seen)));
            }
        }
        for (title, text) in &told.evidence.exhibits {
            self.line(&format!("\n      {title}"));
            for line in text.lines() {
                self.line(&format!("      {}", self.paint("36", line)));
            }
        }
    }

    pub(super) fn summary(&self, steps: &[Told], total: Duration) {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_HORIZONTAL_ONLY)
            .set_content_arrangement(ContentArrangement::Dynamic)
            .set_header(["Step", "Held", "Time", "Figures"]);
        for step in steps {
            let held = step
                .evidence
                .claims
                .iter()
                .filter(|claim| claim.held)
                .count();
            let all = step.evidence.claims.len();
            let colour = if step.evidence.held() {
                Color::Green
            } else {
                Color::Red
            };
            let mut verdict =
                Cell::new(format!("{held} of {all}")).set_alignment(CellAlignment::Right);
            if self.colours {
                verdict = verdict.fg(colour);
            }
            let figures: Vec<String> = step
                .evidence
                .figures
                .iter()
                .map(|(name, value)| format!("{name}: {value}"))
                .collect();
            table.add_row([
                Cell::new(step.title),
                verdict,
                Cell::new(format!("{:.1} s", step.time.as_secs_f64()))
                    .set_alignment(CellAlignment::Right),
                Cell::new(figures.join("\n")),
            ]);
        }
        self.line(&format!("\n{table}"));
        let held = steps.iter().all(|step| step.evidence.held());
        let verdict = if held {
            "Every step held"
        } else {
            "Not every step held"
        };
        self.line(&format!("{verdict}, in {:.1} s.", total.as_secs_f64()));
    }

    fn line(&self, text: &str) {
        self.bars.suspend(|| println!("{text}"));
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colours {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// What to type in a world that was kept.
pub(super) fn look_around(world: &World) {
    let name = &world.options.name;
    let policies = world.directory.path().display();
    println!(
        "
The box is still up. Look around, with this to run a command as a pod does:

  in_pod() {{ pod=$1; shift; ip netns exec {name}-$pod sh -c 'mount --bind \"$0\" /etc/resolv.conf &&
    exec setpriv --reuid 1000 --clear-groups \"$@\"' {folder}/pods/pod-$pod/resolv.conf \"$@\"; }}

  enter a pod              in_pod shop-client bash
  call through the mesh    in_pod shop-client curl -si http://web.shop/
  try to leave             in_pod shop-payer curl -sS --max-time 3 https://attacker.example/
  edit a policy            {policies}/egress.yaml takes effect when it is saved
  a sidecar's metrics      ip netns exec {name}-shop-client curl -s http://127.0.0.1:15020/metrics
  what left, and what not  {turnpike} egress log --store sqlite:{folder}/control/audit.db
  whether the record holds {turnpike} egress verify --store sqlite:{folder}/control/audit.db \\
                             --root-file {folder}/root.pem
  logs of every part       {folder}

Take it down: cargo demo down",
        folder = world.folder.display(),
        turnpike = std::env::current_exe().unwrap_or_else(|_| "turnpike".into()).display(),
    );
}
