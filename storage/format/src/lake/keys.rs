//! Every key of the bucket, built and parsed.
//!
//! A key says what an object is; no object is found in any other way. Keys are lower-case ASCII but for names that come
//! from Nix, ids are ULIDs (which sort by time, so that LIST can go on where it stopped) or digests. Each key has one
//! spelling: parsing is the exact inverse of writing, and a key that does not parse is not ours.
//!
//! Prefixes for LIST end in `/`.

use std::fmt;
use std::str::FromStr;

use super::location::{Domain, PackRef};
use crate::error::FormatError;
use crate::id::{
    AccessId, CacheId, CondemnationId, ConfigId, GenerationId, JournalId, LakeId, LeaseId, PackId, PinId, ReplicaId,
    SegmentId, TokenId, TombstoneId, UploadId,
};
use crate::nix::hash::Sha256Hash;
use crate::nix::realisation::{DrvOutput, RealisationKey};
use crate::nix::store_path::{StorePath, StorePathHash};

/// Prefix of the lake's own documents.
pub const LAKE: &str = "lake/";
/// Prefix of all packs.
pub const PACKS: &str = "packs/";
/// Prefix of all index segments.
pub const SEGMENTS: &str = "segments/";
/// Prefix of all caches.
pub const CACHES: &str = "caches/";
/// Prefix of the journal of commits.
pub const JOURNAL: &str = "journal/";
/// Prefix of the lists of condemned packs.
pub const CONDEMNED: &str = "condemned/";
/// Prefix of the marks on frames that failed verification.
pub const DAMAGED: &str = "damaged/";
/// Prefix of all tombstones.
pub const TOMBSTONES: &str = "tombstones/";
/// Prefix of all leases.
pub const LEASES: &str = "leases/";
/// Prefix of all pins.
pub const PINS: &str = "pins/";
/// Prefix of the access times.
pub const ACCESS: &str = "access/";
/// Prefix of the marks on revoked tokens.
pub const REVOKED: &str = "tokens/revoked/";

/// Most digits of a level of segments.
const LEVEL_MAX: u8 = 99;

/// A key of the bucket.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Key {
    /// `lake/<ulid>.json`
    Lake(LakeId),
    /// `packs/<domain>/<ulid>`
    Pack(PackRef),
    /// `segments/<level>/<ulid>`, the level in two digits
    Segment(u8, SegmentId),
    /// `caches/<cache>/paths/<hash32>/<ulid>`
    PathRecord(CacheId, StorePathHash, GenerationId),
    /// `caches/<cache>/config/<ulid>`
    Config(CacheId, ConfigId),
    /// `caches/<cache>/uploads/<filehash>/<ulid>`, the hash in nix32
    Upload(CacheId, Sha256Hash, UploadId),
    /// `caches/<cache>/files/<filehash>`, the hash in nix32
    File(CacheId, Sha256Hash),
    /// `caches/<cache>/realisations/<hex>/<output>` or `caches/<cache>/build-trace/<drv>/<output>`
    Realisation(CacheId, RealisationKey),
    /// `caches/<cache>/logs/<drv>`
    Log(CacheId, StorePath),
    /// `journal/<ulid>`
    Journal(JournalId),
    /// `condemned/<ulid>`
    Condemned(CondemnationId),
    /// `damaged/<domain>/<pack>/<frame offset>`, the offset in eight hexadecimal digits
    Damaged(PackRef, u32),
    /// `tombstones/<cache>/<hash32>/<ulid>`
    Tombstone(CacheId, StorePathHash, TombstoneId),
    /// `leases/<ulid>`
    Lease(LeaseId),
    /// `pins/<ulid>`
    Pin(PinId),
    /// `access/<day>/<replica>-<ulid>`
    Access(Day, ReplicaId, AccessId),
    /// `tokens/revoked/<ulid>`
    Revoked(TokenId),
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lake(id) => write!(f, "lake/{id}.json"),
            Self::Pack(pack) => write!(f, "packs/{pack}"),
            Self::Segment(level, id) => write!(f, "segments/{level:02}/{id}"),
            Self::PathRecord(cache, path, id) => write!(f, "caches/{cache}/paths/{path}/{id}"),
            Self::Config(cache, id) => write!(f, "caches/{cache}/config/{id}"),
            Self::Upload(cache, file, id) => write!(f, "caches/{cache}/uploads/{}/{id}", file.to_base32()),
            Self::File(cache, file) => write!(f, "caches/{cache}/files/{}", file.to_base32()),
            Self::Realisation(cache, RealisationKey::Hash(DrvOutput { drv_hash, output })) => {
                write!(f, "caches/{cache}/realisations/{}/{output}", drv_hash.to_hex())
            }
            Self::Realisation(cache, RealisationKey::Path { drv, output }) => {
                write!(f, "caches/{cache}/build-trace/{drv}/{output}")
            }
            Self::Log(cache, drv) => write!(f, "caches/{cache}/logs/{drv}"),
            Self::Journal(id) => write!(f, "journal/{id}"),
            Self::Condemned(id) => write!(f, "condemned/{id}"),
            Self::Damaged(pack, offset) => write!(f, "damaged/{pack}/{offset:08x}"),
            Self::Tombstone(cache, path, id) => write!(f, "tombstones/{cache}/{path}/{id}"),
            Self::Lease(id) => write!(f, "leases/{id}"),
            Self::Pin(id) => write!(f, "pins/{id}"),
            Self::Access(day, replica, id) => write!(f, "access/{day}/{replica}-{id}"),
            Self::Revoked(id) => write!(f, "tokens/revoked/{id}"),
        }
    }
}

impl FromStr for Key {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        // No component of a key holds a slash, and no key has more than seven of them.
        let parts: Vec<&str> = text.splitn(8, '/').collect();
        let key = match *parts.as_slice() {
            ["lake", file] => Self::Lake(file.strip_suffix(".json").ok_or(error())?.parse()?),
            ["packs", domain, id] => Self::Pack(pack_ref(domain, id)?),
            ["segments", level, id] => Self::Segment(level.parse().map_err(|_| error())?, id.parse()?),
            ["caches", cache, ref rest @ ..] => cache_key(cache.parse()?, rest)?,
            ["journal", id] => Self::Journal(id.parse()?),
            ["condemned", id] => Self::Condemned(id.parse()?),
            ["damaged", domain, id, offset] => {
                Self::Damaged(pack_ref(domain, id)?, u32::from_str_radix(offset, 16).map_err(|_| error())?)
            }
            ["tombstones", cache, path, id] => Self::Tombstone(cache.parse()?, path.parse()?, id.parse()?),
            ["leases", id] => Self::Lease(id.parse()?),
            ["pins", id] => Self::Pin(id.parse()?),
            ["access", day, name] => {
                let (replica, id) = name.split_once('-').ok_or(error())?;
                Self::Access(day.parse()?, replica.parse()?, id.parse()?)
            }
            ["tokens", "revoked", id] => Self::Revoked(id.parse()?),
            _ => return Err(error()),
        };
        // Numbers have other spellings too, which are not keys of ours.
        if matches!(key, Self::Segment(level, _) if level > LEVEL_MAX) || key.to_string() != text {
            return Err(error());
        }
        Ok(key)
    }
}

fn cache_key(cache: CacheId, parts: &[&str]) -> Result<Key, FormatError> {
    Ok(match *parts {
        ["paths", path, id] => Key::PathRecord(cache, path.parse()?, id.parse()?),
        ["config", id] => Key::Config(cache, id.parse()?),
        ["uploads", file, id] => Key::Upload(cache, Sha256Hash::parse_base32(file)?, id.parse()?),
        ["files", file] => Key::File(cache, Sha256Hash::parse_base32(file)?),
        ["realisations", drv, output] => {
            let id = DrvOutput { drv_hash: Sha256Hash::parse_hex(drv)?, output: output.parse()? };
            Key::Realisation(cache, RealisationKey::Hash(id))
        }
        ["build-trace", drv, output] => {
            Key::Realisation(cache, RealisationKey::Path { drv: drv.parse()?, output: output.parse()? })
        }
        ["logs", drv] => Key::Log(cache, drv.parse()?),
        _ => return Err(error()),
    })
}

fn pack_ref(domain: &str, id: &str) -> Result<PackRef, FormatError> {
    Ok(PackRef { domain: domain.parse()?, id: id.parse::<PackId>()? })
}

const fn error() -> FormatError {
    FormatError::Syntax { field: "bucket key", offset: 0 }
}

/// Key of the lake's document.
#[must_use]
pub fn lake(id: &LakeId) -> String {
    Key::Lake(*id).to_string()
}

/// Key of a pack.
#[must_use]
pub fn pack(pack: &PackRef) -> String {
    Key::Pack(*pack).to_string()
}

/// Prefix of the packs of one domain.
#[must_use]
pub fn packs_of(domain: &Domain) -> String {
    format!("{PACKS}{domain}/")
}

/// The pack that a key names.
#[must_use]
pub fn parse_pack(key: &str) -> Option<PackRef> {
    match key.parse() {
        Ok(Key::Pack(pack)) => Some(pack),
        _ => None,
    }
}

/// Key of an index segment. Levels above 99 do not exist.
///
/// # Panics
/// If the level is above 99.
#[must_use]
pub fn segment(level: u8, id: &SegmentId) -> String {
    assert!(level <= LEVEL_MAX, "segments have levels up to {LEVEL_MAX}");
    Key::Segment(level, *id).to_string()
}

/// The level and id of the segment that a key names.
#[must_use]
pub fn parse_segment(key: &str) -> Option<(u8, SegmentId)> {
    match key.parse() {
        Ok(Key::Segment(level, id)) => Some((level, id)),
        _ => None,
    }
}

/// Prefix of everything of one cache.
#[must_use]
pub fn cache(cache: &CacheId) -> String {
    format!("{CACHES}{cache}/")
}

/// Key of one generation of a path record.
#[must_use]
pub fn path_record(cache: &CacheId, path: &StorePathHash, id: &GenerationId) -> String {
    Key::PathRecord(*cache, *path, *id).to_string()
}

/// Prefix of the path records of a cache.
#[must_use]
pub fn path_records(cache: &CacheId) -> String {
    format!("{CACHES}{cache}/paths/")
}

/// Prefix of the generations of one path's record.
#[must_use]
pub fn path_generations(cache: &CacheId, path: &StorePathHash) -> String {
    format!("{CACHES}{cache}/paths/{path}/")
}

/// Key of one version of a cache's configuration.
#[must_use]
pub fn config(cache: &CacheId, id: &ConfigId) -> String {
    Key::Config(*cache, *id).to_string()
}

/// Prefix of the versions of a cache's configuration.
#[must_use]
pub fn configs(cache: &CacheId) -> String {
    format!("{CACHES}{cache}/config/")
}

/// Key of an upload that waits for its narinfo.
#[must_use]
pub fn upload(cache: &CacheId, file: &Sha256Hash, id: &UploadId) -> String {
    Key::Upload(*cache, *file, *id).to_string()
}

/// Prefix of the uploads of one file.
#[must_use]
pub fn uploads(cache: &CacheId, file: &Sha256Hash) -> String {
    format!("{CACHES}{cache}/uploads/{}/", file.to_base32())
}

/// Key of what became of an uploaded file.
#[must_use]
pub fn file(cache: &CacheId, file: &Sha256Hash) -> String {
    Key::File(*cache, *file).to_string()
}

/// Key of a realisation.
#[must_use]
pub fn realisation(cache: &CacheId, realisation: &RealisationKey) -> String {
    Key::Realisation(*cache, realisation.clone()).to_string()
}

/// Key of a build log.
#[must_use]
pub fn log(cache: &CacheId, drv: &StorePath) -> String {
    Key::Log(*cache, drv.clone()).to_string()
}

/// Key of the mark on a frame that failed verification.
#[must_use]
pub fn damaged(pack: &PackRef, frame_offset: u32) -> String {
    Key::Damaged(*pack, frame_offset).to_string()
}

/// Prefix of the marks on the frames of one pack.
#[must_use]
pub fn damaged_in(pack: &PackRef) -> String {
    format!("{DAMAGED}{pack}/")
}

/// Key of a lease.
#[must_use]
pub fn lease(id: &LeaseId) -> String {
    Key::Lease(*id).to_string()
}

/// A day of the bucket's clock, spelled `<year>-<month>-<day>`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Day(u32);

/// Seconds of a day.
const DAY_S: u64 = 24 * 60 * 60;
/// Days from 1970-01-01 to 9999-12-31, the last day of four-digit years.
const DAY_MAX: u32 = 2_932_896;

impl Day {
    /// The day of a time in seconds since 1970, up to the year 9999.
    #[must_use]
    pub fn of_unix_time(seconds: u64) -> Self {
        Self(u32::try_from(seconds / DAY_S).unwrap_or(DAY_MAX).min(DAY_MAX))
    }

    /// Year, month and day in the Gregorian calendar.
    ///
    /// Years are counted from March, so that the leap day is the last of its year, and in eras of 400 years, which all
    /// have 146,097 days.
    const fn civil(self) -> (u32, u32, u32) {
        let days = self.0 + 719_468;
        let (era, day_of_era) = (days / 146_097, days % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_of_year + 2) / 153;
        let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
        let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
        let year = era * 400 + year_of_era + if month <= 2 { 1 } else { 0 };
        (year, month, day)
    }

    /// The inverse of `civil`, for a month of 1 to 12 and a year from 1970 on; other days give other dates back.
    const fn from_civil(year: u32, month: u32, day: u32) -> Self {
        let year = if month <= 2 { year - 1 } else { year };
        let month_from_march = if month > 2 { month - 3 } else { month + 9 };
        let (era, year_of_era) = (year / 400, year % 400);
        let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        Self(era * 146_097 + day_of_era - 719_468)
    }
}

impl fmt::Display for Day {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = self.civil();
        write!(f, "{year:04}-{month:02}-{day:02}")
    }
}

impl FromStr for Day {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let error = FormatError::Syntax { field: "day", offset: 0 };
        let mut parts = text.splitn(3, '-').map(str::parse::<u32>);
        let mut next = || parts.next().and_then(Result::ok).ok_or(error.clone());
        let (year, month, day) = (next()?, next()?, next()?);
        if !(1970..=9999).contains(&year) || !(1..=12).contains(&month) || !(1..=31).contains(&day) {
            return Err(error);
        }
        let parsed = Self::from_civil(year, month, day);
        if parsed.to_string() == text { Ok(parsed) } else { Err(error) }
    }
}

#[cfg(test)]
mod tests;
