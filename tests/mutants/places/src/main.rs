//! Says where in Rust sources a mutant can be switched on: for each spot that cargo-mutants may change, the text around it that has a
//! value of its own. It changes nothing and knows no mutants: `tests/mutants/run.py` brings both together.
//!
//! `mutants-places FILE...` prints a line for each: file, kind, the span that cargo-mutants names, the span to switch in place of it,
//! the span for a change that binds differently (`&&` to `||`), and what stands in the way. Lines and columns count from 1, columns
//! in characters.

use proc_macro2::LineColumn;
use std::fmt::Write as _;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{BinOp, Block, Expr, Signature, UnOp};

type Area = (LineColumn, LineColumn);

fn area(node: &impl Spanned) -> Area {
    let span = node.span();
    (span.start(), span.end())
}

#[derive(Default)]
struct Places {
    file: String,
    lines: String,
    /// Within a constant, where nothing can be asked at run time, or within a `const fn`, which may be able to do without.
    constant: Option<String>,
    /// The whole of the operators that the next expression is an operand of.
    whole: Option<Area>,
    /// Those have a `let` among them.
    chain: bool,
}

impl Places {
    fn place(&mut self, kind: &str, named: Area, site: Area, whole: Area, hindered: &str) {
        let hindered = self.constant.as_deref().filter(|_| hindered.is_empty()).unwrap_or(hindered);
        let show = |(from, to): Area| format!("{}:{}-{}:{}", from.line, from.column + 1, to.line, to.column + 1);
        let (named, site, whole) = (show(named), show(site), show(whole));
        let _ = writeln!(self.lines, "{}\t{kind}\t{named}\t{site}\t{whole}\t{hindered}", self.file);
    }

    fn function(&mut self, signature: &Signature, block: &Block) {
        let (Some(first), Some(last)) = (block.stmts.first(), block.stmts.last()) else { return };
        let body = (first.span().start(), last.span().end());
        let mut hidden = HiddenType(false);
        hidden.visit_return_type(&signature.output);
        self.place("FnValue", body, body, body, if hidden.0 { "hidden type" } else { "" });
    }

    fn constant(&mut self, visit: impl FnOnce(&mut Self)) {
        let around = self.constant.replace("constant".to_owned());
        self.apart(visit);
        self.constant = around;
    }

    /// What is visited is no operand of the operators around it.
    fn apart(&mut self, visit: impl FnOnce(&mut Self)) {
        let around = (self.whole.take(), std::mem::take(&mut self.chain));
        visit(self);
        (self.whole, self.chain) = around;
    }

    fn in_function(&mut self, signature: &Signature, block: &Block, visit: impl FnOnce(&mut Self)) {
        let constant = signature.constness.as_ref().map(|word| {
            self.place("const fn", area(word), area(word), area(word), &signature.ident.to_string());
            format!("const fn {}", signature.ident)
        });
        let around = std::mem::replace(&mut self.constant, constant);
        self.function(signature, block);
        self.apart(visit);
        self.constant = around;
    }
}

/// Whether a type says `impl`: then all values must be of one type that has no name.
struct HiddenType(bool);

impl<'ast> Visit<'ast> for HiddenType {
    fn visit_type_impl_trait(&mut self, _: &'ast syn::TypeImplTrait) {
        self.0 = true;
    }
}

fn has_let(expression: &Expr) -> bool {
    match expression {
        Expr::Let(_) => true,
        Expr::Binary(binary) => matches!(binary.op, BinOp::And(_)) && (has_let(&binary.left) || has_let(&binary.right)),
        _ => false,
    }
}

impl<'ast> Visit<'ast> for Places {
    fn visit_expr(&mut self, node: &'ast Expr) {
        match node {
            Expr::Binary(_) => visit::visit_expr(self, node),
            _ => self.apart(|places| visit::visit_expr(places, node)),
        }
    }

    fn visit_expr_binary(&mut self, node: &'ast syn::ExprBinary) {
        let chain = self.chain || has_let(&node.left) || has_let(&node.right);
        let own = area(node);
        let around = self.whole;
        let whole = match around {
            Some(whole) => Some(whole),
            None => (!chain).then_some(own),
        };
        let and = matches!(node.op, BinOp::And(_));
        // An operand of the chain itself starts anew.
        let (whole, chain_here) = if chain && !and { (Some(around.unwrap_or(own)), false) } else { (whole, chain) };
        let hindered = if chain_here && and { "let chain" } else { "" };
        self.place("BinaryOperator", area(&node.op), own, whole.unwrap_or(own), hindered);
        let before = (self.whole, self.chain);
        (self.whole, self.chain) = (whole, chain_here);
        self.visit_expr(&node.left);
        self.visit_expr(&node.right);
        (self.whole, self.chain) = before;
    }

    fn visit_expr_unary(&mut self, node: &'ast syn::ExprUnary) {
        if matches!(node.op, UnOp::Not(_) | UnOp::Neg(_)) {
            self.place("UnaryOperator", area(&node.op), area(node), area(node), "");
        }
        visit::visit_expr_unary(self, node);
    }

    fn visit_expr_match(&mut self, node: &'ast syn::ExprMatch) {
        // cargo-mutants is content with `_ if ...`; the compiler is not.
        let rest = node.arms.iter().any(|arm| matches!(arm.pat, syn::Pat::Wild(_)) && arm.guard.is_none());
        for arm in &node.arms {
            let (kind, named, site) = match &arm.guard {
                Some((_, guard)) => ("MatchArmGuard", area(guard), area(guard)),
                None => ("MatchArm", area(arm), area(&arm.pat)),
            };
            let hindered = if kind == "MatchArm" && !rest { "no arm for the rest" } else { "" };
            self.place(kind, named, site, site, hindered);
        }
        visit::visit_expr_match(self, node);
    }

    fn visit_expr_struct(&mut self, node: &'ast syn::ExprStruct) {
        for pair in node.fields.pairs().filter(|_| node.rest.is_some()) {
            let (from, to) = area(*pair.value());
            let to = pair.punct().map_or(to, |comma| comma.span().end());
            self.place("StructField", (from, to), area(node), area(node), "");
        }
        visit::visit_expr_struct(self, node);
    }

    fn visit_item_fn(&mut self, node: &'ast syn::ItemFn) {
        self.in_function(&node.sig, &node.block, |places| visit::visit_item_fn(places, node));
    }

    fn visit_impl_item_fn(&mut self, node: &'ast syn::ImplItemFn) {
        self.in_function(&node.sig, &node.block, |places| visit::visit_impl_item_fn(places, node));
    }

    fn visit_trait_item_fn(&mut self, node: &'ast syn::TraitItemFn) {
        if let Some(block) = &node.default {
            self.in_function(&node.sig, block, |places| visit::visit_trait_item_fn(places, node));
        }
    }

    fn visit_item_const(&mut self, node: &'ast syn::ItemConst) {
        self.constant(|places| visit::visit_item_const(places, node));
    }

    fn visit_impl_item_const(&mut self, node: &'ast syn::ImplItemConst) {
        self.constant(|places| visit::visit_impl_item_const(places, node));
    }

    fn visit_trait_item_const(&mut self, node: &'ast syn::TraitItemConst) {
        self.constant(|places| visit::visit_trait_item_const(places, node));
    }

    fn visit_item_static(&mut self, node: &'ast syn::ItemStatic) {
        self.constant(|places| visit::visit_item_static(places, node));
    }

    fn visit_expr_const(&mut self, node: &'ast syn::ExprConst) {
        self.constant(|places| visit::visit_expr_const(places, node));
    }

    fn visit_type_array(&mut self, node: &'ast syn::TypeArray) {
        self.constant(|places| visit::visit_type_array(places, node));
    }

    fn visit_expr_repeat(&mut self, node: &'ast syn::ExprRepeat) {
        self.visit_expr(&node.expr);
        self.constant(|places| places.visit_expr(&node.len));
    }

    fn visit_variant(&mut self, node: &'ast syn::Variant) {
        self.constant(|places| visit::visit_variant(places, node));
    }

    fn visit_generic_argument(&mut self, node: &'ast syn::GenericArgument) {
        self.constant(|places| visit::visit_generic_argument(places, node));
    }
}

fn main() {
    for file in std::env::args().skip(1) {
        let text = std::fs::read_to_string(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let tree = syn::parse_file(&text).unwrap_or_else(|error| panic!("{file}: {error}"));
        let mut places = Places { file, ..Places::default() };
        places.visit_file(&tree);
        print!("{}", places.lines);
    }
}
