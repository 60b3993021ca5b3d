//! What an inspection found, whatever the format: facts, and tables of things. One value gives the text and the JSON.

use std::io::{self, Write};

use serde::ser::{Serialize, SerializeMap as _, Serializer};

use crate::output::{Report, columns, printable};

/// What is in a file.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Finding {
    /// The format, as people call it.
    pub format: &'static str,
    /// Facts by name; the names are keys of the JSON document.
    pub facts: Vec<(&'static str, Value)>,
    /// Tables.
    pub tables: Vec<Table>,
}

/// Things of one kind.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Table {
    /// What they are; a key of the JSON document.
    pub name: &'static str,
    /// The names of the columns.
    pub columns: &'static [&'static str],
    /// A value for each column, a row for each thing.
    pub rows: Vec<Vec<Value>>,
}

/// A fact.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Value {
    /// Nothing.
    None,
    /// Yes or no.
    Flag(bool),
    /// A number.
    Number(u64),
    /// Text, which may come from anywhere.
    Text(String),
    /// Several.
    List(Vec<String>),
}

impl Value {
    /// A value by its text form.
    pub fn text(value: impl std::fmt::Display) -> Self {
        Self::Text(value.to_string())
    }

    /// A value that may not be there.
    pub fn optional(value: Option<impl std::fmt::Display>) -> Self {
        value.map_or(Self::None, Self::text)
    }

    /// Several values by their text form.
    pub fn list(values: impl IntoIterator<Item = impl std::fmt::Display>) -> Self {
        Self::List(values.into_iter().map(|value| value.to_string()).collect())
    }

    fn show(&self) -> String {
        match self {
            Self::None => "-".to_owned(),
            Self::Flag(true) => "yes".to_owned(),
            Self::Flag(false) => "no".to_owned(),
            Self::Number(number) => number.to_string(),
            Self::Text(text) => printable(text.as_bytes()),
            Self::List(texts) if texts.is_empty() => "-".to_owned(),
            Self::List(texts) => printable(texts.join(" ").as_bytes()),
        }
    }
}

impl From<u64> for Value {
    fn from(number: u64) -> Self {
        Self::Number(number)
    }
}

impl From<u32> for Value {
    fn from(number: u32) -> Self {
        Self::Number(number.into())
    }
}

impl From<usize> for Value {
    fn from(number: usize) -> Self {
        Self::Number(number as u64)
    }
}

impl From<bool> for Value {
    fn from(flag: bool) -> Self {
        Self::Flag(flag)
    }
}

impl Finding {
    /// Facts alone.
    #[must_use]
    pub fn new(format: &'static str, facts: Vec<(&'static str, Value)>) -> Self {
        Self { format, facts, tables: Vec::new() }
    }

    /// With a table.
    #[must_use]
    pub fn with(mut self, name: &'static str, columns: &'static [&'static str], rows: Vec<Vec<Value>>) -> Self {
        self.tables.push(Table { name, columns, rows });
        self
    }
}

impl Serialize for Finding {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("format", self.format)?;
        for (name, value) in &self.facts {
            map.serialize_entry(name, value)?;
        }
        for table in &self.tables {
            map.serialize_entry(table.name, &Rows(table))?;
        }
        map.end()
    }
}

/// A table as a list of objects.
struct Rows<'a>(&'a Table);

impl Serialize for Rows<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.rows.iter().map(|row| Row(self.0.columns, row)))
    }
}

struct Row<'a>(&'static [&'static str], &'a [Value]);

impl Serialize for Row<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.0.iter().zip(self.1))
    }
}

impl Report for Finding {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let mut facts = vec![("format".to_owned(), self.format.to_owned())];
        facts.extend(self.facts.iter().map(|(name, value)| (name.replace('_', " "), value.show())));
        let facts: Vec<_> = facts.iter().map(|(name, value)| (name.as_str(), value.clone())).collect();
        columns(&facts, out)?;
        self.tables.iter().try_for_each(|table| table.print(out))
    }
}

impl Table {
    fn print(&self, out: &mut dyn Write) -> io::Result<()> {
        let head = self.columns.iter().map(|name| name.replace('_', " "));
        let mut rows: Vec<Vec<String>> = vec![head.collect()];
        rows.extend(self.rows.iter().map(|row| row.iter().map(Value::show).collect()));
        let width =
            |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|text| text.chars().count()).max();
        let widths: Vec<usize> = (0..self.columns.len()).filter_map(width).collect();
        writeln!(out, "\n{}: {}", self.name.replace('_', " "), self.rows.len())?;
        for row in &rows {
            let cells: Vec<String> = row.iter().zip(&widths).map(|(text, width)| format!("{text:<width$}")).collect();
            writeln!(out, "  {}", cells.join("  ").trim_end())?;
        }
        Ok(())
    }
}
