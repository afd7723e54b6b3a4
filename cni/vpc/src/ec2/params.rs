//! The parameters of a Query request: `Name`, `List.N`, `Structure.Field`.

use std::{collections::BTreeMap, str::FromStr};

use super::filter::Filter;
use crate::world::{Refusal, Tags};

#[derive(Clone, Debug)]
pub(super) struct Params {
    values: BTreeMap<String, String>,
}

impl Params {
    pub(super) fn parse(form: &[u8]) -> Self {
        let pairs = form_urlencoded::parse(form);
        Self {
            values: pairs
                .map(|(name, value)| (name.into_owned(), value.into_owned()))
                .collect(),
        }
    }

    pub(super) fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str)
    }

    pub(super) fn required(&self, name: &str) -> Result<&str, Refusal> {
        self.get(name)
            .filter(|value| !value.is_empty())
            .ok_or_else(|| Refusal::missing(name))
    }

    /// A value of a type, if it is there.
    pub(super) fn typed<T: FromStr>(&self, name: &str) -> Result<Option<T>, Refusal> {
        self.get(name).map(|text| parsed(name, text)).transpose()
    }

    /// `Name.1`, `Name.2` …, in the order of their numbers.
    pub(super) fn list(&self, name: &str) -> Vec<&str> {
        self.indices(name)
            .into_iter()
            .filter_map(|key| self.get(&key))
            .collect()
    }

    pub(super) fn typed_list<T: FromStr>(&self, name: &str) -> Result<Vec<T>, Refusal> {
        self.list(name)
            .into_iter()
            .map(|text| parsed(name, text))
            .collect()
    }

    /// DryRun asks whether a call would be allowed; by now it would.
    pub(super) fn refuse_dry_run(&self) -> Result<(), Refusal> {
        match self.typed::<bool>("DryRun")? {
            Some(true) => Err(Refusal::dry_run()),
            Some(false) | None => Ok(()),
        }
    }

    pub(super) fn filters(&self) -> Result<Vec<Filter>, Refusal> {
        let filters = self.indices("Filter").into_iter().map(|key| {
            let name = self.required(&format!("{key}.Name"))?;
            let values = self.list(&format!("{key}.Value"));
            Ok(Filter::new(
                name,
                values.into_iter().map(String::from).collect(),
            ))
        });
        filters.collect()
    }

    /// `Tag.N.Key` and `Tag.N.Value` below a prefix.
    pub(super) fn tags(&self, prefix: &str) -> Result<Tags, Refusal> {
        let tags = self
            .indices(&format!("{prefix}Tag"))
            .into_iter()
            .map(|key| {
                let name = self.required(&format!("{key}.Key"))?;
                Ok((
                    name.into(),
                    self.get(&format!("{key}.Value")).unwrap_or_default().into(),
                ))
            });
        tags.collect()
    }

    /// Tags of every TagSpecification for a type of resource.
    pub(super) fn specified_tags(&self, resource: &str) -> Result<Tags, Refusal> {
        let mut all = Tags::new();
        for key in self.indices("TagSpecification") {
            if self.get(&format!("{key}.ResourceType")) != Some(resource) {
                let message = format!("only `{resource}` can be tagged by this call");
                return Err(Refusal::invalid(message));
            }
            all.extend(self.tags(&format!("{key}."))?);
        }
        Ok(all)
    }

    /// The keys `name.N` that occur, also as beginnings of longer ones, in order.
    fn indices(&self, name: &str) -> Vec<String> {
        let numbers = self.values.keys().filter_map(|key| {
            let rest = key.strip_prefix(name)?.strip_prefix('.')?;
            rest.split('.').next()?.parse::<u32>().ok()
        });
        let mut numbers: Vec<u32> = numbers.collect();
        numbers.sort_unstable();
        numbers.dedup();
        numbers
            .into_iter()
            .map(|number| format!("{name}.{number}"))
            .collect()
    }
}

fn parsed<T: FromStr>(name: &str, text: &str) -> Result<T, Refusal> {
    let refuse = |_| Refusal::invalid(format!("Value ({text}) for parameter {name} is invalid."));
    text.parse().map_err(refuse)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_in_the_order_of_their_numbers() {
        let form = "Ip.10=j&Ip.2=b&Ip.1=a&IpCount=3&Filter.1.Name=vpc-id&Filter.1.Value.2=y\
                    &Filter.1.Value.1=x&Tag.1.Key=k&Tag.1.Value=a%20b%26";
        let params = Params::parse(form.as_bytes());
        assert_eq!(params.list("Ip"), ["a", "b", "j"]);
        assert_eq!(params.typed::<u32>("IpCount").unwrap(), Some(3));
        assert_eq!(
            params.filters().unwrap(),
            [Filter::new("vpc-id", vec!["x".into(), "y".into()])]
        );
        assert_eq!(params.tags("").unwrap()["k"], "a b&");
    }

    #[test]
    fn garbage_is_refused_by_name() {
        let params = Params::parse(b"Count=many&DryRun=perhaps&Filter.1.Value.1=x&=&&%ff=%zz");
        assert!(
            params
                .typed::<u32>("Count")
                .unwrap_err()
                .message
                .contains("Count")
        );
        assert_eq!(
            params.refuse_dry_run().unwrap_err().code,
            "InvalidParameterValue"
        );
        assert_eq!(params.filters().unwrap_err().code, "MissingParameter");
    }
}
