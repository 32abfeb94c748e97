//! Reading single fields out of an image, a row in Postgres' composite text form:
//! `(1,,"a ""quoted"" \\ value")`. Pure.
//!
//! Only keys are read here, to find which old and new image are the same row; everything else
//! about an image is left to the servers.

/// The bytes that identify a row: the fields at `positions` (ascending or not), each with its
/// length so that no two keys run together. `None` where the image has no such field or one of
/// them is null.
pub fn key(image: &[u8], positions: &[usize]) -> Option<Vec<u8>> {
    let last = *positions.iter().max()?;
    let mut fields: Vec<Option<Vec<u8>>> = Vec::with_capacity(last + 1);
    let mut reader = Fields::new(image)?;
    while fields.len() <= last {
        fields.push(reader.next_field()?);
    }
    let mut key = Vec::new();
    for &position in positions {
        let field = fields[position].as_ref()?;
        key.extend_from_slice(&(field.len() as u64).to_be_bytes());
        key.extend_from_slice(field);
    }
    Some(key)
}

/// The same fields one by one.
pub fn key_fields(image: &[u8], positions: &[usize]) -> Option<Vec<String>> {
    let last = *positions.iter().max()?;
    let mut reader = Fields::new(image)?;
    let mut fields = Vec::with_capacity(last + 1);
    while fields.len() <= last {
        fields.push(reader.next_field()?);
    }
    let texts = positions.iter().map(|&position| fields[position].clone());
    texts.map(|field| String::from_utf8(field?).ok()).collect()
}

/// The same fields for people: `(5,abc)`.
pub fn key_text(image: &[u8], positions: &[usize]) -> Option<String> {
    let last = *positions.iter().max()?;
    let mut reader = Fields::new(image)?;
    let mut fields = Vec::with_capacity(last + 1);
    while fields.len() <= last {
        fields.push(reader.next_field()?);
    }
    let texts: Vec<String> = positions
        .iter()
        .map(|&position| {
            fields[position]
                .as_deref()
                .map_or_else(String::new, |field| String::from_utf8_lossy(field).into_owned())
        })
        .collect();
    Some(format!("({})", texts.join(",")))
}

/// Walks the fields of an image.
struct Fields<'a> {
    rest: &'a [u8],
    ended: bool,
}

impl<'a> Fields<'a> {
    fn new(image: &'a [u8]) -> Option<Self> {
        let rest = image.strip_prefix(b"(")?.strip_suffix(b")")?;
        Some(Self { rest, ended: false })
    }

    /// The next field's value (`None` inside for null), or `None` after the last.
    fn next_field(&mut self) -> Option<Option<Vec<u8>>> {
        if self.ended {
            return None;
        }
        let mut value = Vec::new();
        // An empty field is null; an empty string is written "".
        let mut null = true;
        let mut quoted = false;
        let mut at = 0;
        while let Some(&byte) = self.rest.get(at) {
            at += 1;
            match byte {
                b',' if !quoted => {
                    self.rest = &self.rest[at..];
                    return Some((!null).then_some(value));
                }
                b'"' if quoted && self.rest.get(at) == Some(&b'"') => {
                    value.push(b'"');
                    at += 1;
                }
                b'"' => {
                    quoted = !quoted;
                    null = false;
                }
                b'\\' => {
                    value.push(*self.rest.get(at)?);
                    at += 1;
                    null = false;
                }
                other => {
                    value.push(other);
                    null = false;
                }
            }
        }
        self.ended = true;
        Some((!null).then_some(value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(image: &str) -> Vec<Option<String>> {
        let mut reader = Fields::new(image.as_bytes()).unwrap();
        std::iter::from_fn(|| reader.next_field())
            .map(|field| field.map(|bytes| String::from_utf8(bytes).unwrap()))
            .collect()
    }

    /// As `record_out` writes: quotes where needed, both quote and backslash doubled.
    fn image(values: &[Option<String>]) -> String {
        let written: Vec<String> = values
            .iter()
            .map(|value| match value {
                None => String::new(),
                Some(text) => {
                    let needs =
                        text.is_empty() || text.contains(|c: char| "\"\\(),".contains(c) || c.is_ascii_whitespace());
                    let escaped = text.replace('\\', "\\\\").replace('"', "\"\"");
                    if needs { format!("\"{escaped}\"") } else { escaped }
                }
            })
            .collect();
        format!("({})", written.join(","))
    }

    #[test]
    fn fields_of_images_that_postgres_wrote() {
        let some = |text: &str| Some(text.to_owned());
        for (text, expected) in [
            ("(1)", vec![some("1")]),
            ("(1,,2)", vec![some("1"), None, some("2")]),
            ("(,)", vec![None, None]),
            ("(\"\",a)", vec![some(""), some("a")]),
            (
                "(\"a,b\",\"c\"\"d\",\"e\\\\f\")",
                vec![some("a,b"), some("c\"d"), some("e\\f")],
            ),
            ("(\"(1,\"\"x y\"\")\",2)", vec![some("(1,\"x y\")"), some("2")]),
            ("(\"{\"\"a\"\",NULL}\")", vec![some("{\"a\",NULL}")]),
        ] {
            assert_eq!(fields(text), expected, "{text}");
        }
    }

    #[test]
    fn keys() {
        assert_eq!(key(b"(1,2,3)", &[0, 2]), key(b"(1,x,3)", &[0, 2]));
        assert_ne!(key(b"(1,23)", &[0, 1]), key(b"(12,3)", &[0, 1]));
        assert_ne!(key(b"(1,2)", &[0, 1]), key(b"(1,2)", &[1, 0]));
        assert_eq!(key(b"(1,,3)", &[1]), None);
        assert_eq!(key(b"(1)", &[1]), None);
        assert_eq!(key(b"()", &[0]), None);
        assert_eq!(key(b"no image", &[0]), None);
        assert_eq!(key(b"(1)", &[]), None);
        assert_eq!(key_text(b"(1,\"a b\",3)", &[1, 0]).as_deref(), Some("(a b,1)"));
        assert_eq!(key_text(b"(1)", &[]), None);
        let fields = key_fields(b"(1,\"a \"\"b\",)", &[1, 0]).unwrap();
        assert_eq!(fields, ["a \"b", "1"]);
        assert_eq!(key_fields(b"(1,)", &[1]), None);
    }

    proptest! {
        #[test]
        fn reads_what_is_written(values in prop::collection::vec(prop::option::of(".{0,8}"), 1..6)) {
            prop_assert_eq!(fields(&image(&values)), values);
        }

        #[test]
        fn never_panics(bytes in prop::collection::vec(any::<u8>(), 0..40), at in 0_usize..4) {
            let _ = key(&bytes, &[at]);
        }
    }
}
