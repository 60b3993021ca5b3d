//! `nix-cache-info`: what a client asks of a binary cache first.
//!
//! Lines of `<name>: <value>`; unknown names are passed over, as Nix does, since upstreams add their own.

use crate::error::FormatError;
use crate::limits::CACHE_INFO_MAX;

use super::store_path::StoreDir;

/// The contents of `nix-cache-info`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheInfo {
    /// The store directory of every path in the cache; a client with another one refuses the cache.
    pub store_dir: StoreDir,
    /// Whether clients may ask for many paths at once without being told to.
    pub want_mass_query: bool,
    /// The cache with the lowest number is asked first. Nix takes 50 where there is none.
    pub priority: Option<u32>,
}

impl CacheInfo {
    /// Reads the text.
    pub fn parse(bytes: &[u8]) -> Result<Self, FormatError> {
        if bytes.len() > CACHE_INFO_MAX {
            let (value, max) = (bytes.len() as u64, CACHE_INFO_MAX as u64);
            return Err(FormatError::Limit { field: "length of nix-cache-info", value, max, offset: 0 });
        }
        let text = str::from_utf8(bytes)
            .map_err(|error| FormatError::Syntax { field: "nix-cache-info", offset: error.valid_up_to() as u64 })?;
        let (mut store_dir, mut want_mass_query, mut priority) = (None, false, None);
        let mut offset = 0;
        for line in text.split_inclusive('\n') {
            let error = |field| FormatError::Syntax { field, offset };
            // A line without a colon is no field: upstreams written by hand have comments and blank lines.
            if let Some((name, value)) = line.split_once(':') {
                let value = value.trim();
                match name {
                    "StoreDir" => store_dir = Some(value.parse().map_err(|_| error("StoreDir"))?),
                    "WantMassQuery" => want_mass_query = value == "1",
                    "Priority" => priority = Some(value.parse().map_err(|_| error("Priority"))?),
                    _ => {}
                }
            }
            offset += line.len() as u64;
        }
        let store_dir = store_dir.ok_or(FormatError::Truncated { field: "StoreDir", offset })?;
        Ok(Self { store_dir, want_mass_query, priority })
    }

    /// Writes the text.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("StoreDir: {}\nWantMassQuery: {}\n", self.store_dir, u8::from(self.want_mass_query));
        if let Some(priority) = self.priority {
            text.push_str(&format!("Priority: {priority}\n"));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, want_mass_query: bool, priority: Option<u32>) {
        let info = CacheInfo { store_dir: StoreDir::default(), want_mass_query, priority };
        assert_eq!(CacheInfo::parse(text.as_bytes()), Ok(info.clone()));
        assert_eq!(CacheInfo::parse(info.to_text().as_bytes()), Ok(info));
    }

    #[test]
    fn texts() {
        check("StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 40\n", true, Some(40));
        check("StoreDir: /nix/store\n", false, None);
        check("# ours\n\nPriority:7\nX-Other: 1\nStoreDir: /nix/store", false, Some(7));
    }

    #[test]
    fn refusals() {
        for text in ["", "WantMassQuery: 1\n", "StoreDir: nix\n", "StoreDir: /nix/store\nPriority: low\n"] {
            assert!(CacheInfo::parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(CacheInfo::parse(b"StoreDir: /nix/store\n\xff").is_err());
        assert!(CacheInfo::parse(&vec![b'\n'; CACHE_INFO_MAX + 1]).is_err());
    }
}
