//! Compiles the runtime interface that `runtime/` speaks.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=runtime/cri.proto");
    let descriptors = protox::compile(["runtime/cri.proto"], ["runtime"])?;
    tonic_prost_build::configure()
        .build_server(false)
        .compile_fds(descriptors)?;
    Ok(())
}
