//! Where a field stands in an object: `spec.allow[0].hosts[1]`, and its steps.

/// A step into a value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// `spec.allow[0].hosts[1]` into its steps.
pub(crate) fn steps(field: &str) -> Vec<Step> {
    let mut steps = Vec::new();
    for part in field.split('.') {
        let mut pieces = part.split('[');
        steps.extend(
            pieces
                .next()
                .filter(|key| !key.is_empty())
                .map(|k| Step::Key(k.to_owned())),
        );
        let indices = pieces.filter_map(|piece| piece.strip_suffix(']')?.parse().ok());
        steps.extend(indices.map(Step::Index));
    }
    steps
}

/// The steps as `spec.allow[0].hosts[1]`.
pub(crate) fn field(steps: &[Step]) -> String {
    let mut field = String::new();
    for step in steps {
        match step {
            Step::Key(key) if field.is_empty() => field.push_str(key),
            Step::Key(key) => field.extend([".", key]),
            Step::Index(index) => field.push_str(&format!("[{index}]")),
        }
    }
    field
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_and_steps_are_one() {
        for text in ["spec.allow[0].hosts[1]", "spec", "a[0][1].b"] {
            assert_eq!(field(&steps(text)), text);
        }
    }
}
