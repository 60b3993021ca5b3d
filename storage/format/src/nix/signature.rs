//! Ed25519 keys and signatures, in Nix's spelling `<key name>:<base 64>`.
//!
//! A key's name is free text that lets a reader pick the right public key; by custom the host name of the cache and a
//! number. A secret key is spelled as libsodium holds it: the 32-byte seed, then the public key.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use ed25519_dalek::{Signer as _, SigningKey, VerifyingKey};

use crate::error::FormatError;
use crate::limits::KEY_NAME_MAX;

/// Bytes of a signature.
pub const SIGNATURE_LEN: usize = 64;

/// A signature with the name of the key that made it.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Signature {
    key_name: KeyName,
    bytes: [u8; SIGNATURE_LEN],
}

impl Signature {
    /// The name of the key.
    #[must_use]
    pub fn key_name(&self) -> &str {
        &self.key_name.0
    }

    /// The signature itself.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; SIGNATURE_LEN] {
        &self.bytes
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.key_name.0, BASE64.encode(self.bytes))
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Signature({self})")
    }
}

impl FromStr for Signature {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let (key_name, bytes) = parse(text, "signature")?;
        Ok(Self { key_name, bytes })
    }
}

/// A key to check signatures with.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    name: KeyName,
    key: VerifyingKey,
}

impl PublicKey {
    /// The key's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name.0
    }

    /// Whether this key, by name and by arithmetic, made the signature over the message.
    #[must_use]
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        // Strict: a weak key or a malleable signature would be valid here and not there.
        self.name == signature.key_name
            && self.key.verify_strict(message, &ed25519_dalek::Signature::from_bytes(&signature.bytes)).is_ok()
    }
}

impl fmt::Display for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.name.0, BASE64.encode(self.key.as_bytes()))
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({self})")
    }
}

impl FromStr for PublicKey {
    type Err = FormatError;

    fn from_str(text: &str) -> Result<Self, FormatError> {
        let (name, bytes) = parse(text, "public key")?;
        let key = VerifyingKey::from_bytes(&bytes).map_err(|_| error("public key"))?;
        Ok(Self { name, key })
    }
}

/// A key to sign with. `Debug` shows the name only; the key's bytes are overwritten when it is dropped.
#[derive(Clone)]
pub struct SecretKey {
    name: KeyName,
    key: SigningKey,
}

impl SecretKey {
    /// The key that follows from a seed, which the caller takes from a source of secrets.
    pub fn generate(name: &str, seed: [u8; 32]) -> Result<Self, FormatError> {
        Ok(Self { name: KeyName::parse(name, "secret key")?, key: SigningKey::from_bytes(&seed) })
    }

    /// The key's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name.0
    }

    /// Signs a message.
    #[must_use]
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature { key_name: self.name.clone(), bytes: self.key.sign(message).to_bytes() }
    }

    /// The key that checks this one's signatures.
    #[must_use]
    pub fn public(&self) -> PublicKey {
        PublicKey { name: self.name.clone(), key: self.key.verifying_key() }
    }

    /// The spelling of the secret itself, for the key file and for nothing else.
    #[must_use]
    pub fn to_secret_text(&self) -> String {
        format!("{}:{}", self.name.0, BASE64.encode(self.key.to_keypair_bytes()))
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SecretKey({}:..)", self.name.0)
    }
}

impl FromStr for SecretKey {
    type Err = FormatError;

    /// Reads what [`SecretKey::to_secret_text`] writes. The public half must belong to the secret one.
    fn from_str(text: &str) -> Result<Self, FormatError> {
        let (name, bytes) = parse(text, "secret key")?;
        let key = SigningKey::from_keypair_bytes(&bytes).map_err(|_| error("secret key"))?;
        Ok(Self { name, key })
    }
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct KeyName(Box<str>);

impl KeyName {
    fn parse(text: &str, field: &'static str) -> Result<Self, FormatError> {
        if text.len() > KEY_NAME_MAX {
            let (value, max) = (text.len() as u64, KEY_NAME_MAX as u64);
            return Err(FormatError::Limit { field: "length of key name", value, max, offset: 0 });
        }
        // Printable, so that a name is one word of a line and of a list of keys, and ends at the colon.
        if text.is_empty() || text.bytes().any(|byte| !byte.is_ascii_graphic() || byte == b':') {
            return Err(error(field));
        }
        Ok(Self(text.into()))
    }
}

fn parse<const N: usize>(text: &str, field: &'static str) -> Result<(KeyName, [u8; N]), FormatError> {
    let (name, digits) = text.split_once(':').ok_or(error(field))?;
    let name = KeyName::parse(name, field)?;
    // The length is checked first: the text is untrusted and may be long.
    if digits.len() != N.div_ceil(3) * 4 {
        return Err(error(field));
    }
    let bytes = BASE64.decode(digits).map_err(|_| error(field))?;
    Ok((name, bytes.try_into().map_err(|_| error(field))?))
}

const fn error(field: &'static str) -> FormatError {
    FormatError::Syntax { field, offset: 0 }
}

#[cfg(test)]
mod tests;
