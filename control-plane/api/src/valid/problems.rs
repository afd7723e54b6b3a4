//! What is wrong with an object, field by field.

use std::fmt;

/// One field that holds what it may not.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// `spec.allow[0].hosts[1]`.
    pub field: String,
    /// As typed; a long one is cut.
    pub value: String,
    /// Why it is not allowed, and what is.
    pub problem: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            field,
            value,
            problem,
        } = self;
        write!(f, "{field}: `{value}` is refused: {problem}")
    }
}

/// An object that cannot be used; at least one problem.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub struct Invalid(Vec<Problem>);

impl Invalid {
    pub fn problems(&self) -> &[Problem] {
        &self.0
    }

    pub(crate) fn one(
        field: impl Into<String>,
        value: impl fmt::Display,
        problem: impl fmt::Display,
    ) -> Self {
        let mut problems = Problems::default();
        problems.add(field, value, problem);
        Self(problems.0)
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, problem) in self.0.iter().enumerate() {
            if i > 0 {
                f.write_str("; ")?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

/// Collects problems while the rest is read on.
#[derive(Debug, Default)]
pub(crate) struct Problems(Vec<Problem>);

impl Problems {
    pub(crate) fn add(
        &mut self,
        field: impl Into<String>,
        value: impl fmt::Display,
        problem: impl fmt::Display,
    ) {
        let mut value = value.to_string();
        if let Some((cut, _)) = value.char_indices().nth(128) {
            value.truncate(cut);
            value.push('…');
        }
        self.0.push(Problem {
            field: field.into(),
            value,
            problem: problem.to_string(),
        });
    }

    /// The result's value, or its error as a problem of the field.
    pub(crate) fn take<T, E: fmt::Display>(
        &mut self,
        field: impl Into<String>,
        value: impl fmt::Display,
        result: Result<T, E>,
    ) -> Option<T> {
        result.map_err(|error| self.add(field, value, error)).ok()
    }

    /// `valid`, if there was no problem.
    pub(crate) fn finish<T>(self, valid: T) -> Result<T, Invalid> {
        if self.0.is_empty() {
            Ok(valid)
        } else {
            Err(Invalid(self.0))
        }
    }

    /// As [`Self::finish`], where a part may be missing only if it had a problem.
    pub(crate) fn finish_some<T>(self, valid: Option<T>) -> Result<T, Invalid> {
        match valid {
            Some(valid) => self.finish(valid),
            None if self.0.is_empty() => Err(Invalid::one(
                "spec",
                "",
                "it cannot be used, for a reason that is not known",
            )),
            None => Err(Invalid(self.0)),
        }
    }
}

/// A prefix whose host bits are zero, so that what is typed is what holds.
pub(crate) fn cidr(text: &str) -> Result<ipnet::IpNet, String> {
    let net: ipnet::IpNet = text
        .parse()
        .map_err(|_| "allowed is a range such as 10.0.64.0/20 or 2001:db8::/48".to_owned())?;
    if net.trunc() == net {
        Ok(net)
    } else {
        Err(format!(
            "bits are set behind the prefix; write {}",
            net.trunc()
        ))
    }
}

pub(crate) fn port(port: u16) -> Result<u16, &'static str> {
    if port == 0 {
        Err("allowed are ports from 1 to 65535")
    } else {
        Ok(port)
    }
}

/// A path in the form that requests are judged in.
pub(crate) fn path(text: &str) -> Result<&str, String> {
    match turnpike_rules::path::normalise(text) {
        Ok(normal) if normal == text && text.starts_with('/') => Ok(text),
        Ok(normal) => Err(format!(
            "requests are judged in normal form; write {normal}"
        )),
        Err(error) => Err(error.to_string()),
    }
}

pub(crate) fn method(text: &str) -> Result<&str, String> {
    match http::Method::from_bytes(text.as_bytes()) {
        Ok(_) if !text.bytes().any(|b| b.is_ascii_lowercase()) => Ok(text),
        Ok(_) => Err(format!(
            "methods are upper case; write {}",
            text.to_ascii_uppercase()
        )),
        Err(_) => Err("allowed is an HTTP method such as GET".to_owned()),
    }
}
