# One derivation for each package of the plan. `closure` hands the builder every input; Nix then finds the references that
# the output really holds by scanning it, as for any other derivation. `env` is a profile of the plan's roots.
{ plan }:
let
  inherit (builtins.fromJSON (builtins.readFile plan)) builder packages roots;
  make = attributes: derivation ({
    system = "x86_64-linux";
    builder = "/usr/bin/python3";
    args = [ "-I" "/debnix/builder.py" ];
    builderHash = builder;
  } // attributes);
  outputs = builtins.mapAttrs (_: package: make {
    inherit (package) name tweak sha256;
    deps = map (dependency: outputs.${dependency}) package.deps;
    closure = map (dependency: outputs.${dependency}) package.closure;
  }) packages;
  env = make {
    name = "env";
    roots = map (root: outputs.${root}) roots;
    closure = builtins.attrValues outputs;
  };
# A list, since nix-build passes over attributes with a dot in their name.
in builtins.attrValues outputs ++ [ env ]
