//! Fields of an incoming object, with words for what is wrong with them.
//!
//! The DEA's schema decides: a required field that is absent or of another type refuses the message;
//! an optional one may be absent or, where the protocol says so, null; unknown keys are ignored.

use crate::reply::ErrorCode;
use serde_json::{Map, Value};

/// A message that cannot be understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct BadMessage {
    /// What kind of mistake.
    pub code: ErrorCode,
    /// What is wrong, where, and what would be right.
    pub message: String,
}

impl BadMessage {
    /// A field that is not as it should be.
    #[must_use]
    pub fn field(message: String) -> Self {
        Self {
            code: ErrorCode::BadField,
            message,
        }
    }
}

/// An object, and the path to it (empty, or `limits.`).
#[derive(Debug, Clone, Copy)]
pub struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

/// The outcome of reading one field.
pub type Read<T> = Result<T, BadMessage>;

impl<'a> Fields<'a> {
    /// The fields of `value`.
    ///
    /// # Errors
    /// If it is no object.
    pub fn of(value: &'a Value, path: &'a str) -> Read<Self> {
        match value.as_object() {
            Some(object) => Ok(Self { object, path }),
            None if path.is_empty() => Err(BadMessage::field(format!(
                "the message is {}; it must be a JSON object",
                kind(value)
            ))),
            None => Err(wrong(path.trim_end_matches('.'), "", value, "an object")),
        }
    }

    /// The value of `key`; null counts as absent.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&'a Value> {
        self.object.get(key).filter(|value| !value.is_null())
    }

    /// Whether `key` is there, also with null.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.object.contains_key(key)
    }

    fn required(&self, key: &str, wanted: &str) -> Read<&'a Value> {
        self.object.get(key).ok_or_else(|| {
            BadMessage::field(format!(
                "`{}{key}` is missing; it must be {wanted}",
                self.path
            ))
        })
    }

    fn as_wanted<T>(&self, key: &str, value: &'a Value, read: Option<T>, wanted: &str) -> Read<T> {
        read.ok_or_else(|| wrong(self.path, key, value, wanted))
    }

    /// A string.
    ///
    /// # Errors
    /// If it is absent or of another type; so for all the others.
    pub fn string(&self, key: &str) -> Read<String> {
        let value = self.required(key, "a string")?;
        self.as_wanted(key, value, value.as_str().map(str::to_owned), "a string")
    }

    /// A string, or absent or null.
    ///
    /// # Errors
    /// If it is of another type.
    pub fn optional_string(&self, key: &str) -> Read<Option<String>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        self.as_wanted(
            key,
            value,
            value.as_str().map(|text| Some(text.to_owned())),
            "a string",
        )
    }

    /// An app's id: a string, or a number as the oldest controllers sent.
    ///
    /// # Errors
    /// If it is absent or neither.
    pub fn id(&self, key: &str) -> Read<String> {
        let value = self.required(key, "a string")?;
        let read = match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
        };
        self.as_wanted(key, value, read, "a string")
    }

    /// A whole number, not negative.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn number(&self, key: &str) -> Read<u64> {
        let wanted = "a whole number, 0 or more";
        let value = self.required(key, wanted)?;
        self.as_wanted(key, value, value.as_u64(), wanted)
    }

    /// A whole number, or absent or null.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn optional_number(&self, key: &str) -> Read<Option<u64>> {
        if self.get(key).is_none() {
            Ok(None)
        } else {
            self.number(key).map(Some)
        }
    }

    /// `true` or `false`, or absent or null.
    ///
    /// # Errors
    /// If it is anything else.
    pub fn optional_bool(&self, key: &str) -> Read<Option<bool>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        self.as_wanted(key, value, value.as_bool().map(Some), "true or false")
    }

    /// An array of strings; absent or null is empty.
    ///
    /// # Errors
    /// If it is no array or holds anything but strings.
    pub fn strings(&self, key: &str) -> Read<Vec<String>> {
        let Some(value) = self.get(key) else {
            return Ok(Vec::new());
        };
        let read = value.as_array().and_then(|items| {
            items
                .iter()
                .map(|item| item.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
        });
        self.as_wanted(key, value, read, "an array of strings")
    }

    /// An array; `None` if it is absent or null.
    ///
    /// # Errors
    /// If it is no array.
    pub fn optional_array(&self, key: &str) -> Read<Option<&'a [Value]>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        self.as_wanted(
            key,
            value,
            value.as_array().map(|items| Some(items.as_slice())),
            "an array",
        )
    }

    /// An object.
    ///
    /// # Errors
    /// If it is absent or anything else.
    pub fn object(&self, key: &str, path: &'a str) -> Read<Self> {
        let value = self.required(key, "an object")?;
        Fields::of(value, path)
    }

    /// This field cannot be used, for a reason of the caller's.
    #[must_use]
    pub fn refuse(&self, key: &str, wanted: &str) -> BadMessage {
        let value = self.object.get(key).unwrap_or(&Value::Null);
        wrong(self.path, key, value, wanted)
    }
}

/// Fields of a start that hold secrets: of their values nothing is shown but the type.
const SECRET: [&str; 4] = ["env", "services", "executableUri", "vcap_application"];

fn wrong(path: &str, key: &str, value: &Value, wanted: &str) -> BadMessage {
    let field = format!("{path}{key}");
    let is_secret = SECRET.iter().any(|secret| {
        let rest = field.strip_prefix(secret);
        rest.is_some_and(|rest| !rest.starts_with(|c: char| c.is_alphanumeric()))
    });
    let is = if is_secret {
        type_of(value)
    } else {
        kind(value)
    };
    BadMessage::field(format!("`{field}` is {is}; it must be {wanted}"))
}

fn type_of(value: &Value) -> String {
    match value {
        Value::String(_) => "a string".into(),
        Value::Number(_) => "a number".into(),
        Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => kind(value),
    }
}

/// A value in a sentence: short and without what may be secret.
fn kind(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Bool(value) => value.to_string(),
        Value::Number(number) => number.to_string(),
        Value::String(text) if text.chars().count() <= 40 => format!("{text:?}"),
        Value::String(_) => "a long string".into(),
        Value::Array(_) => "an array".into(),
        Value::Object(_) => "an object".into(),
    }
}

#[cfg(test)]
mod tests {
    use super::Fields;
    use serde_json::json;

    #[test]
    fn what_may_be_secret_is_not_shown() {
        let value = json!({"env": "A=s3cret", "services": "s3cret", "executableUri": ["s3cret"], "index": "s3cret"});
        let fields = Fields::of(&value, "").unwrap();
        let errors = [
            fields.strings("env").unwrap_err(),
            fields.optional_array("services").unwrap_err(),
            fields.optional_string("executableUri").unwrap_err(),
        ];
        for error in errors {
            assert!(!error.message.contains("s3cret"), "{error}");
        }
        let service = json!({"name": 4711});
        let error = Fields::of(&service, "services[].")
            .unwrap()
            .string("name")
            .unwrap_err();
        assert_eq!(
            error.message,
            "`services[].name` is a number; it must be a string"
        );
        assert!(
            fields
                .number("index")
                .unwrap_err()
                .message
                .contains("s3cret")
        );
    }
}
