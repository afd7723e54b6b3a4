//! What a step of the story says, and whether it held.

use serde::Serialize;

/// One statement about the system, with what was seen of it.
#[derive(Clone, Debug, Serialize)]
pub struct Claim {
    pub says: String,
    pub held: bool,
    pub seen: String,
}

/// Everything one step found out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Evidence {
    pub claims: Vec<Claim>,
    /// Name and value, for the report.
    pub figures: Vec<(String, String)>,
    /// Preformatted text worth seeing whole: a span tree, a record.
    pub exhibits: Vec<(String, String)>,
}

impl Evidence {
    pub fn claim(&mut self, says: impl Into<String>, held: bool, seen: impl Into<String>) {
        self.claims.push(Claim {
            says: says.into(),
            held,
            seen: seen.into(),
        });
    }

    pub fn figure(&mut self, name: impl Into<String>, value: impl ToString) {
        self.figures.push((name.into(), value.to_string()));
    }

    pub fn exhibit(&mut self, title: impl Into<String>, text: impl Into<String>) {
        self.exhibits.push((title.into(), text.into()));
    }

    pub fn held(&self) -> bool {
        !self.claims.is_empty() && self.claims.iter().all(|claim| claim.held)
    }

    /// For tests: every claim that did not hold, or nothing.
    pub fn assert(&self) {
        let broken: Vec<_> = self.claims.iter().filter(|claim| !claim.held).collect();
        assert!(
            !self.claims.is_empty(),
            "a step without claims shows nothing"
        );
        assert!(broken.is_empty(), "did not hold: {broken:#?}");
    }
}
