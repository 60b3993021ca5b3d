//! A store object as the server has it: its narinfo, its tree, and the content of its files.

use std::collections::VecDeque;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use narlake_format::nar::{NarError, Reader};
use narlake_format::nix::compression::Compression;
use narlake_format::nix::hash::Sha256Hasher;
use narlake_format::nix::narinfo::NarInfo;
use narlake_format::nix::store_path::{StoreDir, StorePath};

use crate::client::{Client, ClientError};
use crate::place::Place;
use crate::tree::{Found, Node, TreeBuilder, Walk};

/// A store object.
pub struct Object {
    /// What the cache says about it.
    pub info: NarInfo,
    /// Its tree.
    pub root: Node,
}

impl Object {
    /// Asks the server for an object.
    ///
    /// # Errors
    /// When it is not there, or the server does not answer.
    pub async fn open(client: &Client, dir: &StoreDir, path: &StorePath) -> anyhow::Result<Self> {
        let shown = path.display_in(dir);
        let Some(info) = client.nar_info(dir, &path.hash).await? else {
            bail!("{shown} is not in the lake at {}", client.url());
        };
        if info.store_path != *path {
            bail!("{shown} is not in the lake; the path of this hash is {}", info.store_path.display_in(dir));
        }
        let root = match client.listing(&path.hash).await? {
            Some(listing) => listing.root.into(),
            None => read_tree(client, &info).await.with_context(|| format!("read the NAR of {shown}"))?,
        };
        Ok(Self { info, root })
    }

    /// The content of a file of the object, of this size and at this place in the NAR.
    ///
    /// # Errors
    /// When the server does not answer.
    pub async fn content(
        &self,
        client: &Client,
        nar_offset: u64,
        size: u64,
    ) -> Result<impl Stream<Item = Result<Bytes, ClientError>> + Send + use<>, ClientError> {
        client.nar(&self.info.url, Some((nar_offset, size))).await
    }
}

/// Follows a place, from object to object where symlinks lead there, and gives the object that it ended in, with the
/// node.
///
/// # Errors
/// When it leads nowhere, or the server does not answer.
pub async fn find(client: &Client, dir: &StoreDir, place: &Place, follow_last: bool) -> anyhow::Result<(Object, Node)> {
    if !place.is_in(dir) {
        bail!("{place} is not in the store of the lake at {}, which is {dir}", client.url());
    }
    let mut walk = Walk::new(dir, follow_last);
    let mut path = place.path.clone();
    let mut names: VecDeque<_> = place.inner.clone().into();
    loop {
        let object = Object::open(client, dir, &path).await?;
        match walk.find(&path, &object.root, names)? {
            Found::Here(node) => {
                let node = node.clone();
                return Ok((object, node));
            }
            Found::Elsewhere { path: next, rest } => (path, names) = (next, rest),
        }
    }
}

/// The tree of an object that has no listing, from its whole NAR, which is checked on the way.
async fn read_tree(client: &Client, info: &NarInfo) -> anyhow::Result<Node> {
    if info.compression != Compression::None {
        bail!("there is no listing, and the NAR is compressed with {}", info.compression);
    }
    let (mut reader, mut hasher, mut builder) = (Reader::new(), Sha256Hasher::new(), TreeBuilder::default());
    let mut nar = std::pin::pin!(client.nar(&info.url, None).await?);
    while let Some(piece) = nar.next().await.transpose()? {
        hasher.update(&piece);
        reader.feed::<NarError>(&piece, &mut |event| builder.event(event))?;
    }
    reader.finish()?;
    let actual = hasher.finish();
    if actual != info.nar_hash {
        bail!("its hash is {actual}, the narinfo says {}", info.nar_hash);
    }
    builder.finish().context("it holds no tree")
}
