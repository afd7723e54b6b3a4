//! Medians over the rounds, and our share of each peer's.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Result, ensure};
use comfy_table::{CellAlignment, Table, presets};

use crate::{
    measure::{self, Run},
    stage::{Proxy, Setting, Stage, Subject},
};

type Key = (Setting, u32, Proxy);

/// Services of the mesh when memory is read a last time.
const CROWD: usize = 10_000;

#[derive(Debug, Default)]
pub(crate) struct Results {
    runs: BTreeMap<Key, Vec<Run>>,
    /// KiB a process.
    idle: Vec<(String, u64)>,
    grown: Option<(u64, u64)>,
}

impl Results {
    pub(crate) fn add(&mut self, subject: &Subject, connections: u32, run: Run) {
        self.runs
            .entry((subject.setting, connections, subject.proxy))
            .or_default()
            .push(run);
    }

    /// Memory before any load.
    pub(crate) fn idle(&mut self, subjects: &[Subject]) -> Result<()> {
        for subject in subjects {
            let each = measure::resident(&subject.processes)? / subject.processes.len() as u64;
            self.idle.push((subject.name(), each));
        }
        Ok(())
    }

    /// Memory of one of ours before and after the mesh grows by many Services that nobody calls.
    pub(crate) fn grown(&mut self, stage: &mut Stage) -> Result<()> {
        let Some(subject) = stage.subjects.first() else {
            return Ok(());
        };
        let before = measure::resident(&subject.processes)?;
        let client = subject.client;
        let service = |index: usize| {
            let (high, low) = (10 + index / 250, 1 + index % 250);
            format!(
                "---\napiVersion: v1\nkind: Service\nmetadata: {{name: s{index}, namespace: bench}}\n\
                 spec: {{clusterIP: 10.96.{high}.{low}, selector: {{app: s{index}}}, ports: [{{port: 80}}]}}\n"
            )
        };
        let all: String = (0..CROWD).map(service).collect();
        stage.world.directory.write("crowd", &all)?;
        // The last one is known, though nobody serves it: so are all.
        let (high, low) = (10 + (CROWD - 1) / 250, 1 + (CROWD - 1) % 250);
        let url = format!("http://10.96.{high}.{low}/");
        let line = ["curl", "-s", "--max-time", "2", &url];
        let known = turnpike_rig::wait_for(Duration::from_secs(120), || {
            let said = stage.world.exec(client.0, client.1, &line).ok()?;
            said.out.contains("no endpoint of").then_some(())
        });
        ensure!(
            known.is_some(),
            "the mesh does not know {CROWD} Services after two minutes"
        );
        self.grown = Some((before, measure::resident(&stage.subjects[0].processes)?));
        Ok(())
    }

    pub(crate) fn render(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::ASCII_MARKDOWN).set_header([
            "Setting",
            "Connections",
            "Proxy",
            "CPU/request µs",
            "user µs",
            "requests/s",
            "RSS MB",
            "Turnpike's CPU, of its",
            "user CPU, of its",
        ]);
        for (&(setting, connections, proxy), runs) in &self.runs {
            let ours = self.runs.get(&(setting, connections, Proxy::Turnpike));
            let ratio = |of: fn(&Run) -> f64| match ours {
                Some(ours) if proxy != Proxy::Turnpike => {
                    format!("{:.2}", median(ours, of) / median(runs, of))
                }
                _ => String::new(),
            };
            table.add_row([
                format!("{setting:?}"),
                connections.to_string(),
                format!("{proxy:?}"),
                format!("{:.1}", median(runs, Run::cpu)),
                format!("{:.1}", median(runs, Run::user_cpu)),
                format!("{:.0}", median(runs, |run| run.per_second)),
                format!("{:.1}", median(runs, |run| run.memory as f64 / 1024.0)),
                ratio(Run::cpu),
                ratio(Run::user_cpu),
            ]);
        }
        for column in table.column_iter_mut().skip(3) {
            column.set_cell_alignment(CellAlignment::Right);
        }
        let mut text = format!("{table}\n\nRSS of a proxy before load:\n");
        for (name, kib) in &self.idle {
            text += &format!("  {name:<16} {:>6.1} MB\n", *kib as f64 / 1024.0);
        }
        if let Some((before, after)) = self.grown {
            let grown = (after as f64 - before as f64) / 1024.0;
            text +=
                &format!("Turnpike's, with {CROWD} more Services in the mesh: {grown:+.1} MB\n");
        }
        text
    }
}

fn median(runs: &[Run], of: impl Fn(&Run) -> f64) -> f64 {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
