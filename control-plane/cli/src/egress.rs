//! `turnpike egress`: the record of what left and of what was refused, read from its store.

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use comfy_table::{ContentArrangement, Table, presets};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use turnpike_audit::{Found, Query, Store};
use turnpike_certs::TrustBundle;
use turnpike_ledger::{
    Event, Report, Trust,
    record::{Attempt, Lookup},
};
use turnpike_rules::Identity;

#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, clap::Subcommand)]
enum Action {
    /// List records, newest first
    Log(Log),
    /// Check every node's chain: no gap, no change, no truncation, signatures good
    Verify(Verify),
}

#[derive(Debug, clap::Args)]
struct Log {
    /// The central record, as given to turnpike-audit
    #[arg(long, env = "TURNPIKE_STORE")]
    store: String,
    #[arg(long)]
    namespace: Option<String>,
    #[arg(long)]
    pod: Option<String>,
    #[arg(long, value_parser = ["allowed", "denied", "audit-would-deny"])]
    verdict: Option<String>,
    /// A name asked of DNS, or claimed in SNI or Host
    #[arg(long)]
    name: Option<String>,
    #[arg(long, default_value_t = 50)]
    limit: u32,
    /// Whole records, one JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Verify {
    /// The central record, as given to turnpike-audit
    #[arg(long, env = "TURNPIKE_STORE")]
    store: String,
    /// The mesh's root certificates
    #[arg(long, env = "TURNPIKE_ROOT_FILE")]
    root_file: PathBuf,
    #[arg(long, env = "TURNPIKE_TRUST_DOMAIN", default_value = "cluster.local")]
    trust_domain: String,
}

pub(crate) fn run(arguments: &Arguments) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        match &arguments.action {
            Action::Log(arguments) => log(arguments).await,
            Action::Verify(arguments) => verify(arguments).await,
        }
    })
}

async fn log(arguments: &Log) -> Result<ExitCode> {
    let Log {
        store,
        namespace,
        pod,
        verdict,
        name,
        limit,
        json,
    } = arguments;
    let store = open(store).await?;
    let query = Query {
        namespace: namespace.clone(),
        pod: pod.clone(),
        verdict: verdict.clone(),
        name: name.clone(),
        limit: Some(*limit),
        ..Query::default()
    };
    let found = store.records(&query).await?;
    if *json {
        for record in &found {
            println!("{}", serde_json::to_string(record)?);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header([
            "Time",
            "Pod",
            "Verdict",
            "Asked or claimed",
            "Destination",
            "By or because",
        ]);
    for row in found.iter().filter_map(row) {
        table.add_row(row);
    }
    println!("{table}");
    Ok(ExitCode::SUCCESS)
}

/// A line for what a person asks about: connections, requests and names.
fn row(found: &Found) -> Option<[String; 6]> {
    let time =
        OffsetDateTime::from_unix_timestamp_nanos(i128::from(found.record.time_ms) * 1_000_000);
    let time = time
        .ok()
        .and_then(|time| time.format(&Rfc3339).ok())
        .unwrap_or_default();
    match &found.record.event {
        Event::Opened(attempt) | Event::Request(attempt) | Event::Denied(attempt) => {
            let Attempt {
                pod,
                destination,
                protocol,
                verdict,
                reason,
                rule,
                name,
                claimed,
                ..
            } = attempt;
            let pod = pod.as_ref().map_or("unknown".into(), |pod| {
                format!("{}/{}", pod.namespace, pod.name)
            });
            let rule = rule
                .as_ref()
                .map(|rule| format!("{} {}", rule.policy, rule.id));
            Some([
                time,
                pod,
                verdict.as_str().into(),
                claimed.clone().or_else(|| name.clone()).unwrap_or_default(),
                format!("{destination} {protocol:?}").to_lowercase(),
                reason.clone().or(rule).unwrap_or_default(),
            ])
        }
        Event::Dns(lookup) => {
            let Lookup {
                pod,
                name,
                query_type,
                verdict,
                reason,
                addresses,
                ..
            } = lookup;
            let addresses: Vec<String> = addresses.iter().map(ToString::to_string).collect();
            Some([
                time,
                format!("{}/{}", pod.namespace, pod.name),
                verdict.as_str().into(),
                name.clone(),
                format!("dns {query_type} {}", addresses.join(" ")),
                reason.clone().unwrap_or_default(),
            ])
        }
        _ => None,
    }
}

async fn verify(arguments: &Verify) -> Result<ExitCode> {
    let Verify {
        store,
        root_file,
        trust_domain,
    } = arguments;
    let store = open(store).await?;
    let pem = std::fs::read(root_file).with_context(|| root_file.display().to_string())?;
    let trust = Trust {
        roots: TrustBundle::from_pem(&pem).with_context(|| root_file.display().to_string())?,
        signer: Identity::new(trust_domain, "turnpike-system", "turnpike-gate")?,
    };
    let now = OffsetDateTime::now_utc().unix_timestamp_nanos() / 1_000_000;
    let reports = store.verify(&trust, i64::try_from(now)?).await?;
    if reports.is_empty() {
        println!("the store holds no node's record yet");
    }
    for report in &reports {
        print(report);
    }
    let held = !reports.is_empty() && reports.iter().all(Report::holds);
    Ok(if held {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn print(report: &Report) {
    let verdict = if report.holds() {
        "holds"
    } else {
        "DOES NOT HOLD"
    };
    println!(
        "{}: {verdict}: {} entries, {} signed checkpoints, {} entries after the last",
        report.node,
        report.entries,
        report.checkpoints,
        report.unsealed()
    );
    for problem in &report.problems {
        println!("  {problem}");
    }
}

async fn open(url: &str) -> Result<Store> {
    Store::open_read_only(url)
        .await
        .with_context(|| format!("opening the record at {url}"))
}
