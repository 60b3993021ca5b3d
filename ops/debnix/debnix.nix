# One derivation for each package of the plan. `closure` hands the builder every input; Nix then finds the references that
# the output really holds by scanning it, as for any other derivation. A profile has the programs of its roots.
{ plan }:
let
  inherit (builtins.fromJSON (builtins.readFile plan)) builder packages profiles;
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
  profile = name: { roots, closure }: make {
    inherit name;
    roots = map (root: outputs.${root}) roots;
    closure = map (package: outputs.${package}) closure;
  };
# A list, since nix-build passes over attributes with a dot in their name.
in builtins.attrValues outputs ++ builtins.attrValues (builtins.mapAttrs profile profiles)
