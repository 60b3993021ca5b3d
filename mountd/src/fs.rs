//! The file system, without the kernel: names and nodeids in, attributes and bytes out.
//!
//! The root of the mount is the store directory. It can be looked into by name only, and lists nothing: Nix's garbage
//! collector would take what it lists for its own (docs/semantics.md). A name is a store path of the [`View`]; below
//! it comes the object's tree, which never changes. A nodeid says for itself what it is, through the node table, so
//! nothing is kept about what the kernel holds: no counts, no handles, nothing for FORGET to take back, and a daemon that is started again goes on where
//! the last one stopped.
//!
//! Every operation ends within the deadline, and every failure is counted and logged here, with its path.

pub mod attr;
pub mod contents;
pub mod error;
pub mod nar;
pub mod nodes;
pub mod tree;
pub mod trees;

mod objects;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use narlake_format::error::chain;
use narlake_format::lake::scrub::PatchList;
use narlake_format::nix::store_path::StorePath;

use self::attr::{Attr, Kind};
use self::contents::{Contents, Named};
use self::error::FsError;
use self::nodes::{NodeId, NodeTable, ObjectKey};
pub(crate) use self::objects::Object;
use self::objects::{Objects, Origin};
use self::tree::EntryNumber;
use self::trees::Trees;
use crate::cache::Cache;
use crate::metadata::Blobs;
use crate::metrics::Metrics;
use crate::reader::Reader;
use crate::view::View;

/// What a look-up found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Found {
    /// The entry.
    Entry(Attr),
    /// No such entry, and there never will be: objects do not change.
    NeverThere,
    /// No such entry now. It must be asked for again.
    NotNow,
}

/// Numbers of a [`LazyStore`].
#[derive(Clone, Debug)]
pub struct StoreSettings {
    /// Time limit of one operation.
    pub deadline: Duration,
    /// Bytes of memory for trees that the disk does not take, and for what goes with those that it does.
    pub tree_bytes: u64,
    /// Trees on disk.
    pub trees: Arc<Trees>,
}

/// A store directory that fetches what is read. Cloning shares it.
#[derive(Clone)]
pub struct LazyStore {
    inner: Arc<Inner>,
}

struct Inner {
    view: View,
    nodes: Arc<NodeTable>,
    origin: Origin,
    objects: Arc<Objects>,
    reader: Arc<Reader>,
    settings: StoreSettings,
    metrics: Metrics,
    /// Set where content is looked up by its own name.
    contents: Option<Arc<dyn Contents>>,
}

/// A directory's entries, at the time it was listed; immutable below the root.
pub struct Listing {
    node: NodeId,
    parent: NodeId,
    object: Option<(Arc<Object>, EntryNumber, nodes::ObjectNumber)>,
}

/// One line of a listing.
pub struct ListingEntry<'a> {
    /// Where the listing goes on behind this entry.
    pub next: u64,
    /// Its name.
    pub name: &'a [u8],
    /// What it is.
    pub attr: Attr,
}

impl LazyStore {
    /// A store of what the view shows.
    #[must_use]
    pub fn new(
        view: View,
        nodes: Arc<NodeTable>,
        blobs: &Blobs,
        cache: Arc<Cache>,
        settings: StoreSettings,
        metrics: &Metrics,
    ) -> Self {
        let objects = Arc::new(Objects::new(Arc::clone(&settings.trees), settings.tree_bytes, metrics));
        let reader = Arc::new(Reader::new(blobs.fetcher().clone(), cache, metrics));
        let origin = Origin { blobs: blobs.clone(), view: view.clone() };
        Self {
            inner: Arc::new(Inner {
                view,
                nodes,
                origin,
                objects,
                reader,
                settings,
                metrics: metrics.clone(),
                contents: None,
            }),
        }
    }

    /// A store of what another view shows, which shares nodeids, trees and content with this one: those are the same
    /// whoever shows them. What is not at hand comes from `blobs`, or as for this one.
    #[must_use]
    pub fn of_view(&self, view: View, blobs: Option<Blobs>) -> Self {
        let inner = &self.inner;
        let reader = match &blobs {
            Some(blobs) => Arc::new(inner.reader.of(blobs.fetcher().clone())),
            None => Arc::clone(&inner.reader),
        };
        let blobs = blobs.unwrap_or_else(|| inner.origin.blobs.clone());
        let inner = Inner {
            origin: Origin { blobs, view: view.clone() },
            view,
            nodes: Arc::clone(&inner.nodes),
            objects: Arc::clone(&inner.objects),
            reader,
            settings: inner.settings.clone(),
            metrics: inner.metrics.clone(),
            contents: None,
        };
        Self { inner: Arc::new(inner) }
    }

    /// The same content, by its own name.
    #[must_use]
    pub fn of_contents(&self, contents: Arc<dyn Contents>) -> Self {
        let mut this = self.of_view(self.inner.view.clone(), None);
        if let Some(inner) = Arc::get_mut(&mut this.inner) {
            inner.contents = Some(contents);
        }
        this
    }

    /// A store object with its number, loaded. Cancel safe.
    ///
    /// # Errors
    /// When its number cannot be written down, or its tree not be had.
    pub(crate) async fn load(&self, key: ObjectKey) -> Result<(nodes::ObjectNumber, Arc<Object>), FsError> {
        let number = match self.inner.nodes.number(&key) {
            Some(number) => number,
            None => self.number(key.clone()).await?,
        };
        Ok((number, self.inner.objects.get(number, &self.inner.origin, || Some(key)).await?))
    }

    /// The entry of this name in a directory. Cancel safe.
    ///
    /// # Errors
    /// When it cannot be found out whether there is one.
    pub async fn lookup(&self, parent: NodeId, name: &[u8]) -> Result<Found, FsError> {
        let work = async {
            if let Some(contents) = &self.inner.contents {
                return match contents::lookup(contents.as_ref(), parent, name) {
                    Named::Directory(attr) => Ok(Found::Entry(attr)),
                    Named::Nothing => Ok(Found::NotNow),
                    Named::Content(node) => {
                        let (object, _, entry) = self.object(node).await?;
                        Ok(Found::Entry(attr(&object, node, entry)))
                    }
                };
            }
            if parent == NodeId::ROOT {
                return self.lookup_root(name).await;
            }
            let (object, number, directory) = self.object(parent).await?;
            let tree = &object.tree;
            tree.children(directory).ok_or(FsError::NotDirectory)?;
            let Some(entry) = tree.child(directory, name) else { return Ok(Found::NeverThere) };
            Ok(Found::Entry(attr(&object, NodeId::new(number, entry), entry)))
        };
        self.finish("lookup", parent, Some(name), work).await
    }

    /// What an entry looks like. Cancel safe.
    ///
    /// # Errors
    /// When its tree cannot be had.
    pub async fn getattr(&self, node: NodeId) -> Result<Attr, FsError> {
        let work = async {
            if node == NodeId::ROOT {
                return Ok(Attr::directory(node));
            }
            if let Some(attr) = self.inner.contents.as_ref().and_then(|_| contents::directory_of(node)) {
                return Ok(attr);
            }
            let (object, _, entry) = self.object(node).await?;
            Ok(attr(&object, node, entry))
        };
        self.finish("getattr", node, None, work).await
    }

    /// A symlink's target, restored. Cancel safe.
    ///
    /// # Errors
    /// When the entry is no symlink, or its tree cannot be had.
    pub async fn readlink(&self, node: NodeId) -> Result<Vec<u8>, FsError> {
        let work = async {
            let (object, _, entry) = self.object(node).await?;
            let link = object.tree.link(entry).ok_or(FsError::WrongKind("a symlink"))?;
            let mut target = link.target.to_vec();
            let patches = PatchList::resolve(&link.patches.to_vec(), &object.table, target.len() as u64);
            patches.map_err(FsError::Restore)?.restore(0, &mut target);
            Ok(target)
        };
        self.finish("readlink", node, None, work).await
    }

    /// Bytes of a file; fewer than asked for only at its end. Cancel safe.
    ///
    /// # Errors
    /// When the entry is no file, or its content cannot be had.
    pub async fn read(&self, node: NodeId, offset: u64, length: u32) -> Result<Bytes, FsError> {
        let work = async {
            let (object, _, entry) = self.object(node).await?;
            if object.tree.kind(entry) == Some(Kind::Directory) {
                return Err(FsError::IsDirectory);
            }
            self.inner.reader.read(node, (&object.tree, &object.table, entry), offset, length).await
        };
        let bytes = self.finish("read", node, None, work).await?;
        self.inner.metrics.read_bytes.inc_by(bytes.len() as u64);
        Ok(bytes)
    }

    /// A directory's entries. Cancel safe.
    ///
    /// # Errors
    /// When the entry is no directory, or its tree cannot be had.
    pub async fn list(&self, node: NodeId) -> Result<Listing, FsError> {
        let work = async {
            let hidden = self.inner.contents.is_some() && contents::directory_of(node).is_some();
            if node == NodeId::ROOT || hidden {
                return Ok(Listing { node, parent: NodeId::ROOT, object: None });
            }
            let (object, number, entry) = self.object(node).await?;
            object.tree.children(entry).ok_or(FsError::NotDirectory)?;
            let parent = match object.tree.parent(entry) {
                Some(parent) if entry != 0 => NodeId::new(number, parent),
                _ => NodeId::ROOT,
            };
            Ok(Listing { node, parent, object: Some((object, entry, number)) })
        };
        self.finish("readdir", node, None, work).await
    }

    async fn lookup_root(&self, name: &[u8]) -> Result<Found, FsError> {
        // Not even the form of a store path: there is nobody to ask.
        let path: Option<StorePath> = std::str::from_utf8(name).ok().and_then(|name| name.parse().ok());
        let Some(path) = path else { return Ok(Found::NeverThere) };
        if !self.inner.view.may_show(&path.hash) {
            return Ok(Found::NeverThere);
        }
        let Some(record) = self.inner.view.lookup(&path).await.map_err(FsError::View)? else {
            return Ok(Found::NotNow);
        };
        let key = ObjectKey::of(&record);
        let number = match self.inner.nodes.number(&key) {
            Some(number) => number,
            None => self.number(key).await?,
        };
        let object = self.inner.objects.get(number, &self.inner.origin, || Some(ObjectKey::of(&record))).await?;
        Ok(Found::Entry(attr(&object, NodeId::new(number, 0), 0)))
    }

    /// Gives an object its number. The row is on disk before anybody hears of it.
    async fn number(&self, key: ObjectKey) -> Result<nodes::ObjectNumber, FsError> {
        let nodes = Arc::clone(&self.inner.nodes);
        let metrics = self.inner.metrics.clone();
        let registered = tokio::task::spawn_blocking(move || {
            let numbers = nodes.register(&[key]);
            metrics.objects.set(i64::try_from(nodes.len()).unwrap_or(i64::MAX));
            numbers
        });
        let numbers = crate::error::joined(registered).await.map_err(FsError::Nodes)?;
        numbers.into_iter().next().ok_or(FsError::NotFound)
    }

    /// The object, object number and entry that a nodeid stands for.
    async fn object(&self, node: NodeId) -> Result<(Arc<Object>, nodes::ObjectNumber, EntryNumber), FsError> {
        let stale = FsError::Stale { node: node.0 };
        let Some((number, entry)) = node.split() else {
            return Err(if node == NodeId::ROOT { FsError::IsDirectory } else { stale });
        };
        let object = self.inner.objects.get(number, &self.inner.origin, || self.inner.nodes.object(number)).await?;
        if object.tree.kind(entry).is_none() {
            return Err(stale);
        }
        Ok((object, number, entry))
    }

    /// Ends an operation within the deadline; counts it and logs its failure.
    async fn finish<T>(
        &self,
        operation: &'static str,
        node: NodeId,
        name: Option<&[u8]>,
        work: impl Future<Output = Result<T, FsError>>,
    ) -> Result<T, FsError> {
        let limit = self.inner.settings.deadline;
        let limit_ms = u64::try_from(limit.as_millis()).unwrap_or(u64::MAX);
        let done = tokio::time::timeout(limit, work).await.unwrap_or(Err(FsError::Deadline { limit_ms }));
        if let Err(error) = &done {
            if error.is_deadline() {
                self.inner.metrics.deadline_expirations.inc();
            }
            if error.is_failure() {
                self.inner.metrics.fuse_errors.with_label_values(&[operation]).inc();
                let mut path = self.path_of(node);
                if let Some(name) = name {
                    path = format!("{path}/{}", String::from_utf8_lossy(name));
                }
                let error = chain(error);
                tracing::error!(op = operation, path, node = format_args!("{:#x}", node.0), error, "operation failed");
            }
        }
        done
    }

    /// The path of a node, as far as it is known without asking anybody.
    fn path_of(&self, node: NodeId) -> String {
        let dir = self.inner.view.store_dir().as_str();
        let Some((number, entry)) = node.split() else { return dir.to_owned() };
        let Some(key) = self.inner.nodes.object(number) else { return format!("{dir}/?") };
        let inside = match self.inner.objects.peek(number) {
            Some(object) => object.tree.path(entry),
            None => format!("entry {entry}"),
        };
        format!("{dir}/{}{}{inside}", key.path, if inside.is_empty() { "" } else { "/" })
    }
}

impl Listing {
    /// The entries behind `offset`, which is 0 or the `next` of an entry.
    pub fn entries_from(&self, offset: u64) -> impl Iterator<Item = ListingEntry<'_>> {
        let dots = [(b".".as_slice(), self.node), (b"..".as_slice(), self.parent)];
        let dots = dots.into_iter().map(|(name, node)| (name, Attr::directory(node)));
        let children = self.object.iter().flat_map(|(object, directory, number)| {
            let children = object.tree.children(*directory).unwrap_or_default();
            children.iter().map(|entry| (object.tree.name(*entry), attr(object, NodeId::new(*number, *entry), *entry)))
        });
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        let numbered = (1_u64..).zip(dots.chain(children));
        numbered.skip(from).map(|(next, (name, attr))| ListingEntry { next, name, attr })
    }
}

fn attr(object: &Object, node: NodeId, entry: EntryNumber) -> Attr {
    match object.tree.kind(entry) {
        Some(Kind::Directory) | None => Attr::directory(node),
        Some(kind) => Attr { node, kind, size: object.tree.size(entry) },
    }
}
