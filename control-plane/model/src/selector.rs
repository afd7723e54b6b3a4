//! Label selectors, and two indexes so that neither side is ever walked whole: from a pod's labels
//! to the selectors that match it, and from a selector to the pods that it matches.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    hash::Hash,
    sync::Arc,
};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;

pub(crate) type Labels = BTreeMap<String, String>;

/// Kubernetes' label selector; an empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Selector {
    labels: Labels,
    expressions: Vec<Expression>,
}

#[derive(Clone, Debug, PartialEq)]
struct Expression {
    key: String,
    test: Test,
}

#[derive(Clone, Debug, PartialEq)]
enum Test {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
    /// An operator that Kubernetes does not have: the selector matches nothing.
    Unknown,
}

impl Selector {
    pub(crate) fn labels(labels: Labels) -> Self {
        Self {
            labels,
            expressions: Vec::new(),
        }
    }

    pub(crate) fn read(selector: &LabelSelector) -> Self {
        let expressions = selector
            .match_expressions
            .iter()
            .flatten()
            .map(|expression| {
                let values = || expression.values.clone().unwrap_or_default();
                let test = match expression.operator.as_str() {
                    "In" => Test::In(values()),
                    "NotIn" => Test::NotIn(values()),
                    "Exists" => Test::Exists,
                    "DoesNotExist" => Test::DoesNotExist,
                    _ => Test::Unknown,
                };
                Expression {
                    key: expression.key.clone(),
                    test,
                }
            });
        Self {
            expressions: expressions.collect(),
            labels: selector.match_labels.clone().unwrap_or_default(),
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.labels.is_empty() && self.expressions.is_empty()
    }

    pub(crate) fn matches(&self, labels: &Labels) -> bool {
        self.labels
            .iter()
            .all(|(key, value)| labels.get(key) == Some(value))
            && self.expressions.iter().all(|Expression { key, test }| {
                let value = labels.get(key);
                match test {
                    Test::In(allowed) => value.is_some_and(|value| allowed.contains(value)),
                    Test::NotIn(refused) => value.is_none_or(|value| !refused.contains(value)),
                    Test::Exists => value.is_some(),
                    Test::DoesNotExist => value.is_none(),
                    Test::Unknown => false,
                }
            })
    }
}

/// From labels to the selectors that match them. Each selector stands under one of the labels it
/// asks for; one that asks for none is looked at for every pod of its scope.
#[derive(Debug)]
pub(crate) struct Selectors<K> {
    entries: HashMap<K, (Option<Arc<str>>, Selector)>,
    mesh: Scope<K>,
    namespaces: HashMap<Arc<str>, Scope<K>>,
}

#[derive(Debug)]
struct Scope<K> {
    by_label: HashMap<String, HashMap<String, BTreeSet<K>>>,
    rest: BTreeSet<K>,
}

impl<K> Default for Selectors<K> {
    fn default() -> Self {
        Self {
            entries: HashMap::new(),
            mesh: Scope::default(),
            namespaces: HashMap::new(),
        }
    }
}

impl<K> Default for Scope<K> {
    fn default() -> Self {
        Self {
            by_label: HashMap::new(),
            rest: BTreeSet::new(),
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Selectors<K> {
    /// `namespace`: where it selects; `None` for the whole mesh.
    pub(crate) fn insert(&mut self, key: K, namespace: Option<Arc<str>>, selector: Selector) {
        self.remove(&key);
        let scope = match &namespace {
            Some(namespace) => self.namespaces.entry(namespace.clone()).or_default(),
            None => &mut self.mesh,
        };
        match selector.labels.first_key_value() {
            Some((label, value)) => {
                let values = scope.by_label.entry(label.clone()).or_default();
                values.entry(value.clone()).or_default().insert(key.clone());
            }
            None => {
                scope.rest.insert(key.clone());
            }
        }
        self.entries.insert(key, (namespace, selector));
    }

    pub(crate) fn remove(&mut self, key: &K) {
        let Some((namespace, selector)) = self.entries.remove(key) else {
            return;
        };
        let scope = match &namespace {
            Some(namespace) => self.namespaces.entry(namespace.clone()).or_default(),
            None => &mut self.mesh,
        };
        scope.rest.remove(key);
        if let Some((label, value)) = selector.labels.first_key_value() {
            forget(&mut scope.by_label, label, value, key);
        }
        if let Some(namespace) = namespace
            && self.namespaces.get(&namespace).is_some_and(Scope::is_empty)
        {
            self.namespaces.remove(&namespace);
        }
    }

    /// The selectors that match a pod, in the order of their keys.
    pub(crate) fn matching(&self, namespace: &str, labels: &Labels) -> BTreeSet<K> {
        let mut found = BTreeSet::new();
        for scope in self
            .namespaces
            .get(namespace)
            .into_iter()
            .chain([&self.mesh])
        {
            let labelled = labels
                .iter()
                .filter_map(|(label, value)| scope.by_label.get(label)?.get(value))
                .flatten();
            let hits = labelled.chain(&scope.rest).filter(|key| {
                self.entries
                    .get(*key)
                    .is_some_and(|(_, s)| s.matches(labels))
            });
            found.extend(hits.cloned());
        }
        found
    }
}

impl<K> Scope<K> {
    fn is_empty(&self) -> bool {
        self.by_label.is_empty() && self.rest.is_empty()
    }
}

/// From a selector to what it matches.
#[derive(Debug)]
pub(crate) struct Labelled<K> {
    namespaces: HashMap<Arc<str>, Population<K>>,
}

#[derive(Debug)]
struct Population<K> {
    all: BTreeMap<K, Labels>,
    by_label: HashMap<String, HashMap<String, BTreeSet<K>>>,
}

impl<K> Default for Labelled<K> {
    fn default() -> Self {
        Self {
            namespaces: HashMap::new(),
        }
    }
}

impl<K: Clone + Eq + Hash + Ord> Labelled<K> {
    pub(crate) fn insert(&mut self, key: K, namespace: &Arc<str>, labels: &Labels) {
        self.remove(&key, namespace);
        let population = self
            .namespaces
            .entry(namespace.clone())
            .or_insert_with(|| Population {
                all: BTreeMap::new(),
                by_label: HashMap::new(),
            });
        for (label, value) in labels {
            let values = population.by_label.entry(label.clone()).or_default();
            values.entry(value.clone()).or_default().insert(key.clone());
        }
        population.all.insert(key, labels.clone());
    }

    pub(crate) fn remove(&mut self, key: &K, namespace: &str) {
        let Some(population) = self.namespaces.get_mut(namespace) else {
            return;
        };
        let Some(labels) = population.all.remove(key) else {
            return;
        };
        for (label, value) in &labels {
            forget(&mut population.by_label, label, value, key);
        }
        if population.all.is_empty() {
            self.namespaces.remove(namespace);
        }
    }

    /// What a selector matches, in one namespace or in all.
    pub(crate) fn select(&self, namespace: Option<&str>, selector: &Selector) -> Vec<K> {
        let populations: Vec<_> = match namespace {
            Some(namespace) => self.namespaces.get(namespace).into_iter().collect(),
            None => self.namespaces.values().collect(),
        };
        let mut found: Vec<K> = populations
            .iter()
            .flat_map(|p| p.select(selector))
            .collect();
        found.sort_unstable();
        found
    }
}

impl<K: Clone + Ord> Population<K> {
    fn select(&self, selector: &Selector) -> Vec<K> {
        let matches = |key: &&K| self.all.get(*key).is_some_and(|l| selector.matches(l));
        let narrowest = selector
            .labels
            .iter()
            .map(|(label, value)| {
                self.by_label
                    .get(label)
                    .and_then(|values| values.get(value))
            })
            .min_by_key(|set| set.map_or(0, BTreeSet::len));
        match narrowest {
            Some(None) => Vec::new(),
            Some(Some(set)) => set.iter().filter(matches).cloned().collect(),
            None => self.all.keys().filter(matches).cloned().collect(),
        }
    }
}

fn forget<K: Ord>(
    index: &mut HashMap<String, HashMap<String, BTreeSet<K>>>,
    label: &str,
    value: &str,
    key: &K,
) {
    let Some(values) = index.get_mut(label) else {
        return;
    };
    if let Some(set) = values.get_mut(value) {
        set.remove(key);
        if set.is_empty() {
            values.remove(value);
        }
    }
    if values.is_empty() {
        index.remove(label);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    fn selector(yaml: &str) -> Selector {
        Selector::read(&serde_saphyr::from_str(yaml).unwrap())
    }

    #[test]
    fn expressions_follow_kubernetes() {
        let web = labels(&[("app", "web"), ("tier", "front")]);
        for (yaml, expected) in [
            ("{}", true),
            ("{matchLabels: {app: web}}", true),
            ("{matchLabels: {app: web, tier: back}}", false),
            (
                "{matchExpressions: [{key: app, operator: In, values: [api, web]}]}",
                true,
            ),
            (
                "{matchExpressions: [{key: app, operator: NotIn, values: [web]}]}",
                false,
            ),
            (
                "{matchExpressions: [{key: absent, operator: NotIn, values: [web]}]}",
                true,
            ),
            ("{matchExpressions: [{key: tier, operator: Exists}]}", true),
            (
                "{matchExpressions: [{key: tier, operator: DoesNotExist}]}",
                false,
            ),
            ("{matchExpressions: [{key: tier, operator: Maybe}]}", false),
        ] {
            assert_eq!(selector(yaml).matches(&web), expected, "{yaml}");
        }
    }

    #[test]
    fn both_indexes_agree_with_the_selector_itself() {
        let selectors = [
            selector("{}"),
            selector("{matchLabels: {app: web}}"),
            selector("{matchLabels: {app: api, tier: front}}"),
            selector("{matchExpressions: [{key: tier, operator: Exists}]}"),
        ];
        let population = [
            labels(&[]),
            labels(&[("app", "web")]),
            labels(&[("app", "api"), ("tier", "front")]),
            labels(&[("app", "api"), ("tier", "back")]),
        ];
        let namespace: Arc<str> = "shop".into();
        let mut forward = Selectors::default();
        let mut backward = Labelled::default();
        for (index, selector) in selectors.iter().enumerate() {
            let scope = (index % 2 == 0).then(|| namespace.clone());
            forward.insert(index, scope, selector.clone());
        }
        for (index, labels) in population.iter().enumerate() {
            backward.insert(index, &namespace, labels);
        }
        for (s, selector) in selectors.iter().enumerate() {
            let expected: Vec<usize> = (0..population.len())
                .filter(|p| selector.matches(&population[*p]))
                .collect();
            assert_eq!(backward.select(Some("shop"), selector), expected);
            for (p, labels) in population.iter().enumerate() {
                assert_eq!(
                    forward.matching("shop", labels).contains(&s),
                    expected.contains(&p)
                );
            }
        }
        forward.remove(&1);
        backward.remove(&1, "shop");
        assert!(!forward.matching("shop", &population[1]).contains(&1));
        assert!(!backward.select(None, &selectors[0]).contains(&1));
    }
}
