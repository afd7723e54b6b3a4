//! The mesh's own configuration.

pub(crate) use turnpike_api::valid::MeshSettings as Mesh;
