//! Filters and pages of Describe calls.

use super::params::Params;
use crate::world::Refusal;

/// One of the values must match; `*` and `?` are wildcards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Filter {
    name: String,
    values: Vec<String>,
}

impl Filter {
    pub(super) fn new(name: &str, values: Vec<String>) -> Self {
        Self {
            name: name.into(),
            values,
        }
    }

    fn matches(&self, has: &[String]) -> bool {
        self.values
            .iter()
            .any(|pattern| has.iter().any(|text| like(pattern, text)))
    }
}

/// Keeps what every filter matches. `field` gives what an item has under a filter's name, none if
/// the call knows no such filter.
pub(super) fn keep<T>(
    items: Vec<T>,
    filters: &[Filter],
    field: impl Fn(&T, &str) -> Option<Vec<String>>,
) -> Result<Vec<T>, Refusal> {
    let mut kept = Vec::with_capacity(items.len());
    for item in items {
        let mut all = true;
        for filter in filters {
            let has = field(&item, &filter.name).ok_or_else(|| unknown(&filter.name))?;
            all &= filter.matches(&has);
        }
        if all {
            kept.push(item);
        }
    }
    Ok(kept)
}

fn unknown(name: &str) -> Refusal {
    Refusal::invalid(format!("The filter '{name}' is invalid"))
}

/// What tags give under `tag:KEY` and `tag-key`.
pub(super) fn tag_field(tags: &crate::world::Tags, name: &str) -> Option<Vec<String>> {
    if name == "tag-key" {
        return Some(tags.keys().cloned().collect());
    }
    let key = name.strip_prefix("tag:")?;
    Some(tags.get(key).cloned().into_iter().collect())
}

/// The next page of items that are in the order of their ids, and the token for the one after.
pub(super) fn page<T>(
    items: Vec<T>,
    id: impl Fn(&T) -> String,
    params: &Params,
    least: usize,
) -> Result<(Vec<T>, Option<String>), Refusal> {
    let after = params.get("NextToken").map(open_token).transpose()?;
    let size = params.typed::<usize>("MaxResults")?.unwrap_or(1_000);
    if !(least..=1_000).contains(&size) {
        let message = format!(
            "Value ({size}) for parameter MaxResults is invalid. Expecting {least} to 1000."
        );
        return Err(Refusal::invalid(message));
    }
    let mut rest = items
        .into_iter()
        .filter(|item| after.as_ref().is_none_or(|last| id(item) > *last));
    let page: Vec<T> = rest.by_ref().take(size).collect();
    let more = rest.next().is_some();
    let token = page
        .last()
        .filter(|_| more)
        .map(|last| seal_token(&id(last)));
    Ok((page, token))
}

/// Opaque to callers, as AWS's is.
fn seal_token(last: &str) -> String {
    last.bytes().map(|byte| format!("{byte:02x}")).collect()
}

fn open_token(token: &str) -> Result<String, Refusal> {
    let bytes = token.as_bytes().chunks(2).map(|pair| {
        let text = std::str::from_utf8(pair)
            .ok()
            .filter(|text| text.len() == 2)?;
        u8::from_str_radix(text, 16).ok()
    });
    bytes
        .collect::<Option<Vec<u8>>>()
        .and_then(|bytes| String::from_utf8(bytes).ok())
        .ok_or_else(|| Refusal::invalid("The token in NextToken is not one that was given out"))
}

fn like(pattern: &str, text: &str) -> bool {
    let (pattern, text) = (pattern.as_bytes(), text.as_bytes());
    // Where to take up again when what follows the last `*` did not match.
    let (mut p, mut t, mut again) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                again = Some((p + 1, t));
                p += 1;
            }
            Some(&byte) if byte == b'?' || byte == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match again {
                Some((after, from)) => {
                    (p, t) = (after, from + 1);
                    again = Some((after, from + 1));
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|byte| *byte == b'*')
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn wildcards() {
        for (pattern, text, expected) in [
            ("eni-1", "eni-1", true),
            ("eni-1", "eni-12", false),
            ("aws-K8S-*", "aws-K8S-i-0abc", true),
            ("*", "", true),
            ("?", "", false),
            ("a*b*c", "aXbYbZc", true),
            ("a*b*c", "aXbYbZ", false),
            ("i-?", "i-1", true),
        ] {
            assert_eq!(like(pattern, text), expected, "{pattern} {text}");
        }
    }

    proptest! {
        /// Every item comes once, whatever the size of the pages.
        #[test]
        fn pages_cover_everything_once(count in 0usize..60, size in 5usize..20) {
            let items: Vec<String> = (0..count).map(|n| format!("eni-{n:017x}")).collect();
            let (mut seen, mut token) = (Vec::new(), None::<String>);
            loop {
                let next = token.as_ref().map_or_else(String::new, |t| format!("&NextToken={t}"));
                let params = Params::parse(format!("MaxResults={size}{next}").as_bytes());
                let (page, more) = page(items.clone(), String::clone, &params, 5).unwrap();
                prop_assert!(page.len() <= size);
                seen.extend(page);
                token = more;
                if token.is_none() {
                    break;
                }
            }
            prop_assert_eq!(seen, items);
        }

        #[test]
        fn any_token_is_answered(token in ".*") {
            let _ = open_token(&token);
        }
    }
}
