//! JSON fields whose values have a text form: written by `Display`, read by `FromStr`.
//!
//! For use as `#[serde(with = "json::text")]` and `#[serde(with = "json::texts")]`, so that documents hold parsed values
//! and not strings.

/// One value.
pub(crate) mod text {
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(crate) fn serialize<T: Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(value)
    }

    pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<T, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        std::borrow::Cow::<'de, str>::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

/// A list of values.
pub(crate) mod texts {
    use std::fmt::{self, Display};
    use std::marker::PhantomData;
    use std::str::FromStr;

    use serde::de::{SeqAccess, Visitor};
    use serde::{Deserialize, Deserializer, Serializer};

    pub(crate) fn serialize<T: Display, S: Serializer>(values: &[T], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(values.iter().map(|value| AsText(value)))
    }

    struct AsText<'a, T>(&'a T);

    impl<T: Display> serde::Serialize for AsText<'_, T> {
        fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
            serializer.collect_str(self.0)
        }
    }

    pub(crate) fn deserialize<'de, T, D>(deserializer: D) -> Result<Vec<T>, D::Error>
    where
        T: FromStr<Err: Display>,
        D: Deserializer<'de>,
    {
        deserializer.deserialize_seq(Texts(PhantomData))
    }

    struct Texts<T>(PhantomData<T>);

    impl<'de, T: FromStr<Err: Display>> Visitor<'de> for Texts<T> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a list of strings")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut values = Vec::new();
            while let Some(Item(value)) = list.next_element()? {
                values.push(value);
            }
            Ok(values)
        }
    }

    #[derive(Deserialize)]
    #[serde(transparent, bound = "T: FromStr<Err: Display>")]
    struct Item<T>(#[serde(with = "super::text")] T);
}
