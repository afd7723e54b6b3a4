//! The demo's report as one page that needs nothing else.

use std::time::Duration;

use maud::{DOCTYPE, Markup, PreEscaped, html};

use super::Told;

const STYLE: &str = include_str!("page.css");

pub(super) fn render(steps: &[Told], total: Duration) -> Markup {
    let claims = || steps.iter().flat_map(|step| &step.evidence.claims);
    let (held, all) = (
        claims().filter(|claim| claim.held).count(),
        claims().count(),
    );
    html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Turnpike demo" }
                style { (PreEscaped(STYLE)) }
            }
            body {
                header {
                    h1 { "Turnpike" span { "what held on the VPC in a box" } }
                    div.figures {
                        (figure(&format!("{held} / {all}"), "statements held"))
                        (figure(&format!("{:.1} s", total.as_secs_f64()), "from nothing to here"))
                        (figure(&steps.len().to_string(), "steps of real traffic"))
                    }
                    (timeline(steps, total))
                }
                main { @for step in steps { (section(step)) } }
            }
        }
    }
}

fn figure(value: &str, name: &str) -> Markup {
    html! { div.figure { strong { (value) } span { (name) } } }
}

/// Each step's share of the time, as a bar.
fn timeline(steps: &[Told], total: Duration) -> Markup {
    let share = |step: &Told| 100.0 * step.time.as_secs_f64() / total.as_secs_f64().max(0.001);
    html! {
        div.timeline {
            @for step in steps {
                div style=(format!("width:{:.2}%", share(step)))
                    class=(if step.evidence.held() { "held" } else { "broken" })
                    title=(format!("{}: {:.1} s", step.title, step.time.as_secs_f64())) {
                    (step.number)
                }
            }
        }
    }
}

fn section(step: &Told) -> Markup {
    html! {
        section {
            h2 {
                span.number { (step.number) } (step.title)
                span.time { (format!("{:.1} s", step.time.as_secs_f64())) }
            }
            ul {
                @for claim in &step.evidence.claims {
                    li class=(if claim.held { "held" } else { "broken" }) {
                        (claim.says)
                        @if !claim.seen.trim().is_empty() { code { (claim.seen.trim()) } }
                    }
                }
            }
            @if !step.evidence.figures.is_empty() {
                dl { @for (name, value) in &step.evidence.figures { dt { (name) } dd { (value) } } }
            }
            @for (title, text) in &step.evidence.exhibits {
                figure { figcaption { (title) } pre { (text) } }
            }
        }
    }
}
