//! What a pod is answered.
//!
//! For a selected pod: only names that its rules have, or the cluster's own; only types that a
//! connection needs; never an address that leads around the gate; and always the ledger first.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::{Duration, Instant},
};

use hickory_proto::rr::RecordType;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use turnpike_ledger::{Event, record};
use turnpike_rules::{address, egress, host::HostName, pod::PodEgress};

use super::{
    cache::Cache,
    flights::Answers,
    message::{Code, Question, Reply},
};
use crate::{
    describe,
    metrics::{Answered, Metrics},
    spool::Spool,
    state::{Pod, PodRuntime, Standing, State, View},
};

/// Answers kept, in each of two generations.
const CACHE: usize = 8192;

/// Where questions go.
#[derive(Clone, Debug)]
pub struct DnsConfig {
    pub upstream: SocketAddr,
    pub cluster: SocketAddr,
    /// `cluster.local`.
    pub cluster_domain: HostName,
    /// Names below these that no rule has do not exist, so that a client walks on through its
    /// search list; a refusal would end its search.
    pub search_domains: Vec<HostName>,
}

/// Answers questions; shared by all sockets.
#[derive(Debug)]
pub struct Resolver {
    config: DnsConfig,
    state: State,
    spool: Spool,
    answers: Answers,
    metrics: Arc<Metrics>,
}

/// Why a question is not answered, for the record.
struct Refusal {
    code: Code,
    reason: String,
    rule: Option<record::RuleRef>,
}

impl Refusal {
    fn new(code: Code, reason: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.into(),
            rule: None,
        }
    }
}

impl Resolver {
    pub fn new(config: DnsConfig, state: State, spool: Spool, metrics: Arc<Metrics>) -> Self {
        Self {
            config,
            state,
            spool,
            answers: Answers::new(Cache::new(CACHE)),
            metrics,
        }
    }

    /// Room for one more question of the pod at `source`; None while it has as many as it may have.
    /// Whoever is no pod needs no room: it is refused at once.
    pub fn admit(&self, source: IpAddr) -> Option<Option<OwnedSemaphorePermit>> {
        self.room(source, |runtime| &runtime.questions)
    }

    /// The same for a connection of questions.
    pub fn admit_connection(&self, source: IpAddr) -> Option<Option<OwnedSemaphorePermit>> {
        self.room(source, |runtime| &runtime.dns_connections)
    }

    fn room(
        &self,
        source: IpAddr,
        of: impl Fn(&PodRuntime) -> &Arc<Semaphore>,
    ) -> Option<Option<OwnedSemaphorePermit>> {
        match self.state.view().standing(source).pod() {
            Some(pod) => of(&pod.runtime).clone().try_acquire_owned().ok().map(Some),
            None => Some(None),
        }
    }

    /// The reply to `question` from `source`. What is allowed is in the pod's ledger when this
    /// returns.
    pub async fn resolve(&self, source: IpAddr, question: &Question) -> Reply {
        let view = self.state.view();
        let standing = view.standing(source);
        let result = match &standing {
            Standing::Unknown => "unknown-source",
            standing => match self.answer(&view, standing, question).await {
                Ok(reply) => {
                    self.count("answered");
                    return reply;
                }
                Err(refusal) => {
                    let code = refusal.code;
                    self.record_refusal(standing, question, refusal, record::Verdict::Denied);
                    self.count("refused");
                    return Reply::failure(code);
                }
            },
        };
        self.count(result);
        Reply::failure(Code::Refused)
    }

    async fn answer(
        &self,
        view: &View,
        standing: &Standing,
        question: &Question,
    ) -> Result<Reply, Refusal> {
        let budget = standing
            .pod()
            .is_none_or(|pod| pod.runtime.queries.lock().take(Instant::now()));
        if !budget {
            return Err(Refusal::new(
                Code::Refused,
                "more questions a second than a pod may ask",
            ));
        }
        match standing {
            Standing::Unselected(_) => self.forward(question).await,
            Standing::Selected(pod, egress) => {
                let answered = self
                    .answer_selected(view, standing, pod, egress, question)
                    .await;
                match answered {
                    Err(refusal) if egress.only_audits() => {
                        let verdict = record::Verdict::AuditWouldDeny;
                        self.record_refusal(standing, question, refusal, verdict);
                        self.forward(question).await
                    }
                    answered => answered,
                }
            }
            Standing::Unknown | Standing::NoPolicy(_) => Err(Refusal::new(
                Code::Refused,
                "an egress policy selects the pod, but the controller has not sent it yet",
            )),
        }
    }

    async fn answer_selected(
        &self,
        view: &View,
        standing: &Standing,
        pod: &Pod,
        egress: &PodEgress,
        question: &Question,
    ) -> Result<Reply, Refusal> {
        if question.kind == RecordType::PTR {
            return match question.reversed_address() {
                Some(address) if view.is_cluster(address) => self.forward(question).await,
                _ => Err(Refusal::new(
                    Code::Refused,
                    "only addresses of the cluster are looked up backwards",
                )),
            };
        }
        let name = question
            .host()
            .ok_or_else(|| Refusal::new(Code::Refused, "it is not a host name"))?;
        if self.is_cluster_name(&name) {
            return self.forward(question).await;
        }
        let verdict = egress.resolve(&name);
        if !verdict.allowed {
            let below = |domain: &HostName| name == *domain || name.is_below(domain);
            let searched = self.config.search_domains.iter().any(below);
            let code = if searched {
                Code::NoSuchName
            } else {
                Code::Refused
            };
            let rule = describe::rule(&verdict);
            return Err(Refusal {
                code,
                reason: verdict.reason.to_string(),
                rule,
            });
        }
        if !carries_connections(question.kind) {
            let reason = format!("type {} is of no use for a connection", question.kind);
            return Err(Refusal {
                code: Code::Refused,
                reason,
                rule: describe::rule(&verdict),
            });
        }
        let reply = self.forward(question).await?;
        let reply = self.keep_public(reply, view, egress, &verdict)?;
        self.learn(standing, pod, &name, &verdict, question, &reply)?;
        Ok(reply)
    }

    /// Takes out addresses that a name outside the cluster must not lead to.
    fn keep_public(
        &self,
        reply: Reply,
        view: &View,
        egress: &PodEgress,
        verdict: &egress::Verdict,
    ) -> Result<Reply, Refusal> {
        let before = reply.addresses();
        let reply = reply.without(|address| leads_inside(address, view, egress));
        if before.is_empty() || !reply.records.is_empty() {
            return Ok(reply);
        }
        let reason = format!(
            "the name leads to {}, which is not public; if that is meant, allow the range under \
             `cidrs`",
            before[0]
        );
        Err(Refusal {
            code: Code::Refused,
            reason,
            rule: describe::rule(verdict),
        })
    }

    fn learn(
        &self,
        standing: &Standing,
        pod: &Pod,
        name: &HostName,
        verdict: &egress::Verdict,
        question: &Question,
        reply: &Reply,
    ) -> Result<(), Refusal> {
        let addresses = reply.addresses();
        if addresses.is_empty() {
            return Ok(());
        }
        let ttl = Duration::from_secs(reply.ttl.into());
        let learned =
            pod.runtime
                .names
                .lock()
                .learn(name, &reply.chain, &addresses, ttl, Instant::now());
        let news = learned.map_err(|_| {
            Refusal::new(
                Code::Failed,
                "the pod has as many answers as are kept for one",
            )
        })?;
        // Repeats within an answer's life add nothing to the record.
        if let Some(pod) = standing.recorded().filter(|_| news) {
            self.spool.note(Event::Dns(record::Lookup {
                pod,
                name: name.to_string(),
                query_type: question.kind.to_string(),
                verdict: describe::verdict(verdict),
                reason: describe::reason(verdict),
                rule: describe::rule(verdict),
                answer_chain: reply.chain.clone(),
                addresses,
                ttl_seconds: reply.ttl.into(),
                count: 1,
            }));
        }
        Ok(())
    }

    /// From the cache or the server that the name belongs to.
    async fn forward(&self, question: &Question) -> Result<Reply, Refusal> {
        if let Some(reply) = self.answers.cached(question) {
            self.metrics.dns_cache_hits.inc();
            return Ok(reply);
        }
        let ours = question
            .host()
            .is_some_and(|name| self.is_cluster_name(&name))
            || question.kind == RecordType::PTR;
        let server = if ours {
            self.config.cluster
        } else {
            self.config.upstream
        };
        match self.answers.ask(server, question).await {
            Ok(reply) => Ok(reply),
            Err(error) => {
                tracing::warn!(%error, name = question.name, "a question found no answer");
                self.count("no-answer");
                Ok(Reply::failure(Code::Failed))
            }
        }
    }

    fn is_cluster_name(&self, name: &HostName) -> bool {
        *name == self.config.cluster_domain || name.is_below(&self.config.cluster_domain)
    }

    fn record_refusal(
        &self,
        standing: &Standing,
        question: &Question,
        refusal: Refusal,
        verdict: record::Verdict,
    ) {
        let (Some(pod), Some(recorded)) = (standing.pod(), standing.recorded()) else {
            return;
        };
        if !self.spool.may_record_denial(Some(pod), Instant::now()) {
            return;
        }
        self.spool.note(Event::Dns(record::Lookup {
            pod: recorded,
            name: describe::bounded(&question.name),
            query_type: question.kind.to_string(),
            verdict,
            reason: Some(refusal.reason),
            rule: refusal.rule,
            answer_chain: vec![],
            addresses: vec![],
            ttl_seconds: 0,
            count: 1,
        }));
    }

    fn count(&self, result: &'static str) {
        self.metrics.dns.get_or_create(&Answered { result }).inc();
    }
}

fn carries_connections(kind: RecordType) -> bool {
    use RecordType::{A, AAAA, CNAME, HTTPS, SRV, SVCB};
    matches!(kind, A | AAAA | CNAME | HTTPS | SVCB | SRV)
}

/// An answer that would turn a name outside the cluster into a way to the node, the cluster or the
/// VPC. A private range is fine where a rule of the pod names it.
fn leads_inside(address: IpAddr, view: &View, egress: &PodEgress) -> bool {
    if address::special(address).is_some() || view.is_cluster(address) {
        return true;
    }
    let rules = egress.policies.iter().flat_map(|policy| &policy.rules);
    let named = rules
        .flat_map(|rule| &rule.cidrs)
        .any(|range| range.contains(&address));
    is_private(address) && !named
}

fn is_private(address: IpAddr) -> bool {
    match address {
        // RFC 1918, and RFC 6598's shared space, which VPCs use for pods.
        IpAddr::V4(v4) => v4.is_private() || matches!(v4.octets(), [100, 64..=127, ..]),
        IpAddr::V6(v6) => v6.is_unique_local(),
    }
}

#[cfg(test)]
#[path = "resolver_tests.rs"]
mod tests;
