//! Harm done to objects of the bucket behind the engine's back.

/// What befalls an object.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// It is gone.
    Deleted,
    /// Its second half is gone.
    Truncated,
    /// One bit of its first half is another.
    Flipped,
}

impl Damage {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Deleted, Self::Truncated, Self::Flipped];

    /// What is left of these bytes.
    #[must_use]
    pub fn of(self, bytes: &[u8]) -> Option<Vec<u8>> {
        match self {
            Self::Deleted => None,
            Self::Truncated => Some(bytes[..bytes.len() / 2].to_vec()),
            Self::Flipped => {
                let mut bytes = bytes.to_vec();
                let at = bytes.len() / 3;
                if let Some(byte) = bytes.get_mut(at) {
                    *byte ^= 0x04;
                }
                Some(bytes)
            }
        }
    }
}
