//! Tokens to a `Module`.
use super::lexer::{Lexed, Token, lex};
use super::*;

type Res<T> = Result<T, ParseError>;

pub fn parse(text: &str) -> Result<Module, ParseError> {
    let tokens = lex(text)?;
    let mut p = Parser { tokens, at: 0 };
    let mut module = p.module()?;
    module.lines = std::sync::Arc::new(text.lines().map(|l| l.trim().to_string()).collect());
    for i in 0..module.kernels.len() {
        module.kernels[i].static_shared = super::shared_layout(&module, &module.kernels[i]).1;
    }
    Ok(module)
}

struct Parser {
    tokens: Vec<Lexed>,
    at: usize,
}

impl Parser {
    fn peek(&self) -> Option<&Token> {
        self.tokens.get(self.at).map(|t| &t.token)
    }

    fn peek_at(&self, ahead: usize) -> Option<&Token> {
        self.tokens.get(self.at + ahead).map(|t| &t.token)
    }

    fn line(&self) -> u32 {
        self.tokens.get(self.at).or(self.tokens.last()).map_or(0, |t| t.line)
    }

    fn fail<T>(&self, what: impl Into<String>) -> Res<T> {
        Err(ParseError { line: self.line(), what: what.into() })
    }

    fn next(&mut self) -> Res<Token> {
        let Some(t) = self.tokens.get(self.at) else { return self.fail("the text ends too early") };
        self.at += 1;
        Ok(t.token.clone())
    }

    fn sign(&mut self, c: char) -> bool {
        let here = self.peek() == Some(&Token::Sign(c));
        self.at += here as usize;
        here
    }

    fn expect(&mut self, c: char) -> Res<()> {
        if self.sign(c) {
            return Ok(());
        }
        self.fail(format!("expected `{c}`, found {:?}", self.peek()))
    }

    fn dot(&mut self, word: &str) -> bool {
        let here = matches!(self.peek(), Some(Token::Dot(d)) if d == word);
        self.at += here as usize;
        here
    }

    fn word(&mut self) -> Res<String> {
        match self.next()? {
            Token::Word(w) => Ok(w),
            other => {
                self.at -= 1;
                self.fail(format!("expected a name, found {other:?}"))
            }
        }
    }

    fn int(&mut self) -> Res<i128> {
        let negative = self.sign('-');
        match self.next()? {
            Token::Int(v) => Ok(if negative { -v } else { v }),
            other => {
                self.at -= 1;
                self.fail(format!("expected an integer, found {other:?}"))
            }
        }
    }

    fn module(&mut self) -> Res<Module> {
        let mut m = Module::default();
        while let Some(token) = self.peek().cloned() {
            let Token::Dot(word) = token else { return self.fail(format!("unexpected {token:?} between definitions")) };
            match word.as_str() {
                "version" => {
                    self.at += 1;
                    m.version = match self.next()? {
                        Token::F64(bits) => format!("{:.1}", f64::from_bits(bits)),
                        other => return self.fail(format!(".version {other:?}")),
                    };
                }
                "target" => {
                    self.at += 1;
                    m.target = self.word()?;
                    while self.sign(',') {
                        self.word()?;
                    }
                }
                "address_size" => {
                    self.at += 1;
                    if self.int()? != 64 {
                        return self.fail("only .address_size 64 is supported");
                    }
                }
                "file" | "loc" => self.skip_line(),
                "section" => self.skip_section()?,
                "alias" | "pragma" => while self.next()? != Token::Sign(';') {},
                "visible" | "weak" | "extern" | "common" | "entry" | "func" | "global" | "const" | "shared" => {
                    self.definition(&mut m)?
                }
                _ => return self.fail(format!("unknown directive .{word}")),
            }
        }
        Ok(m)
    }

    fn skip_line(&mut self) {
        let line = self.line();
        while self.tokens.get(self.at).is_some_and(|t| t.line == line) {
            self.at += 1;
        }
    }

    fn skip_section(&mut self) -> Res<()> {
        while self.next()? != Token::Sign('{') {}
        while self.next()? != Token::Sign('}') {}
        Ok(())
    }

    fn definition(&mut self, m: &mut Module) -> Res<()> {
        let mut is_extern = false;
        loop {
            let line = self.line();
            if self.dot("extern") {
                is_extern = true;
            } else if self.dot("visible") || self.dot("weak") || self.dot("common") {
            } else if self.dot("entry") {
                return self.kernel(m, line);
            } else if self.dot("func") {
                return self.function(m, line);
            } else {
                let mut made = self.variables()?;
                made.iter_mut().for_each(|v| v.is_extern = is_extern);
                for v in made {
                    match v.space {
                        Space::Shared => m.shared.push(v),
                        Space::Global | Space::Const if is_extern => {
                            return self.fail(format!("extern variable {} is not defined in this module", v.name));
                        }
                        Space::Global | Space::Const => m.globals.push(v),
                        _ => return self.fail(format!("variable {} in an unexpected state space", v.name)),
                    }
                }
                return Ok(());
            }
        }
    }

    fn kernel(&mut self, m: &mut Module, line: u32) -> Res<()> {
        let mut k = Kernel { name: self.word()?, line, ..Kernel::default() };
        let mut offset = 0usize;
        if self.sign('(') {
            for v in self.params()? {
                offset = offset.next_multiple_of(v.align);
                k.params.push(Param { name: v.name, offset, size: v.size, align: v.align });
                offset += v.size;
            }
        }
        let mut most_registers = None;
        loop {
            if self.dot("maxntid") {
                k.max_threads = Some(self.triple()?);
            } else if self.dot("reqntid") {
                k.max_threads = Some(self.triple()?);
                k.exact_threads = true;
            } else if self.dot("reqnctapercluster") {
                k.cluster = Some(self.triple()?);
            } else if self.dot("maxnreg") {
                most_registers = Some(self.int()? as u32);
            } else if self.dot("minnctapersm") || self.dot("maxnctapersm") || self.dot("maxclusterrank") {
                self.int()?;
            } else if self.dot("explicitcluster")
                || self.dot("blocksareclusters")
                || self.dot("unified")
                || self.dot("noreturn")
            {
            } else if self.dot("pragma") {
                while self.next()? != Token::Sign(';') {}
            } else {
                break;
            }
        }
        k.body = self.body()?;
        let mut declared = 0;
        for s in &k.body {
            if let Statement::Declare(v) = s {
                match v.space {
                    Space::Local => k.local_bytes = k.local_bytes.next_multiple_of(v.align as u32) + v.size as u32,
                    Space::Reg if v.ty != "pred" => {
                        declared += v.count.unwrap_or(1) * (type_size(&v.ty).unwrap_or(4) as u32).div_ceil(4)
                    }
                    _ => {}
                }
            }
        }
        k.registers = most_registers.unwrap_or((declared / 3).clamp(16, 255));
        m.kernels.push(k);
        Ok(())
    }

    fn triple(&mut self) -> Res<[u32; 3]> {
        let mut out = [self.int()? as u32, 1, 1];
        for slot in &mut out[1..] {
            if self.sign(',') {
                *slot = self.int()? as u32;
            }
        }
        Ok(out)
    }

    fn function(&mut self, m: &mut Module, line: u32) -> Res<()> {
        let mut f = Function { line, ..Function::default() };
        if self.sign('(') {
            f.returns = self.params()?;
        }
        f.name = self.word()?;
        if self.sign('(') {
            f.params = self.params()?;
        }
        while self.dot("noreturn") || self.dot("unified") || self.dot("pragma") {
            while matches!(self.peek(), Some(Token::Text(_))) {
                self.at += 1;
            }
        }
        if !self.sign(';') {
            f.body = Some(self.body()?);
        }
        // A declaration may precede the definition.
        match m.functions.iter_mut().find(|g| g.name == f.name) {
            Some(old) if old.body.is_none() => *old = f,
            Some(_) if f.body.is_none() => {}
            Some(_) => return self.fail(format!("function {} is defined twice", f.name)),
            None => m.functions.push(f),
        }
        Ok(())
    }

    /// Parameters up to and with `)`.
    fn params(&mut self) -> Res<Vec<Variable>> {
        let mut out = vec![];
        if self.sign(')') {
            return Ok(out);
        }
        loop {
            let space = self.space()?;
            out.push(self.declarator_type(space).and_then(|v| self.declarator(v))?);
            if !self.sign(',') {
                self.expect(')')?;
                return Ok(out);
            }
        }
    }

    fn space(&mut self) -> Res<Space> {
        for (word, space) in [
            ("reg", Space::Reg),
            ("param", Space::Param),
            ("local", Space::Local),
            ("shared", Space::Shared),
            ("global", Space::Global),
            ("const", Space::Const),
        ] {
            if self.dot(word) {
                return Ok(space);
            }
        }
        self.fail(format!("expected a state space, found {:?}", self.peek()))
    }

    /// `.align 8 .attribute(...) .v2 .f32 .ptr .global .align 4`
    fn declarator_type(&mut self, space: Space) -> Res<Variable> {
        let mut v = Variable { space, ..Variable::default() };
        let mut lanes = 1;
        while let Some(Token::Dot(word)) = self.peek().cloned() {
            self.at += 1;
            match word.as_str() {
                "align" => v.align = self.int()? as usize,
                "attribute" => while self.next()? != Token::Sign(')') {},
                "v2" => lanes = 2,
                "v4" => lanes = 4,
                "v8" => lanes = 8,
                "ptr" => {
                    // What the pointer points to: a promise to ptxas that changes nothing here.
                    while let Some(Token::Dot(_)) = self.peek() {
                        if self.dot("align") {
                            self.int()?;
                        } else {
                            self.at += 1;
                        }
                    }
                    break;
                }
                ty if type_size(ty).is_some() => v.ty = word,
                _ => return self.fail(format!("unknown word .{word} in a declaration")),
            }
        }
        let Some(size) = type_size(&v.ty) else { return self.fail("a declaration without a type") };
        v.size = size * lanes;
        if v.align == 0 {
            v.align = v.size;
        }
        Ok(v)
    }

    /// `name`, `name<12>`, `name[3][4]`; `like` has the type.
    fn declarator(&mut self, like: Variable) -> Res<Variable> {
        let mut v = Variable { name: self.word()?, ..like };
        if self.sign('<') {
            v.count = Some(self.int()? as u32);
            self.expect('>')?;
        }
        while self.sign('[') {
            let n = if self.peek() == Some(&Token::Sign(']')) { 0 } else { self.int()? };
            v.size *= n as usize;
            self.expect(']')?;
        }
        Ok(v)
    }

    /// One declaration statement, up to and with its `;`.
    fn variables(&mut self) -> Res<Vec<Variable>> {
        let space = self.space()?;
        let like = self.declarator_type(space)?;
        let mut out = vec![];
        loop {
            let mut v = self.declarator(like.clone())?;
            if self.sign('=') {
                let element = type_size(&v.ty).unwrap_or(1);
                self.initialiser(element, &mut v.init)?;
                let given: usize = v.init.iter().map(|i| if let Init::Bytes(b) = i { b.len() } else { 8 }).sum();
                v.size = v.size.max(given);
            }
            out.push(v);
            if !self.sign(',') {
                break;
            }
        }
        self.expect(';')?;
        Ok(out)
    }

    fn initialiser(&mut self, element: usize, out: &mut Vec<Init>) -> Res<()> {
        if self.sign('{') {
            while !self.sign('}') {
                self.initialiser(element, out)?;
                self.sign(',');
            }
            return Ok(());
        }
        let negative = self.sign('-');
        match self.next()? {
            Token::Int(v) => {
                let v = if negative { -v } else { v };
                out.push(Init::Bytes(v.to_le_bytes()[..element].to_vec()));
            }
            Token::F32(bits) => out.push(Init::Bytes(bits.to_le_bytes().to_vec())),
            Token::F64(bits) if element == 4 => {
                out.push(Init::Bytes((f64::from_bits(bits) as f32).to_le_bytes().to_vec()))
            }
            Token::F64(bits) => out.push(Init::Bytes(bits.to_le_bytes().to_vec())),
            Token::Word(word) if element == 8 => {
                let mut name = word;
                if name == "generic" && self.sign('(') {
                    name = self.word()?;
                    self.expect(')')?;
                }
                let offset = self.signed_tail()?;
                out.push(Init::Symbol { name, offset });
            }
            other => return self.fail(format!("unsupported initialiser {other:?}")),
        }
        Ok(())
    }

    /// `+ 8`, `- 8`, `+-8` or nothing.
    fn signed_tail(&mut self) -> Res<i64> {
        if self.sign('+') {
            return Ok(self.int()? as i64);
        }
        if self.sign('-') {
            return Ok(-(self.int()? as i64));
        }
        Ok(0)
    }

    fn body(&mut self) -> Res<Vec<Statement>> {
        self.expect('{')?;
        let mut out = vec![];
        let mut depth = 0;
        loop {
            if self.sign('{') {
                depth += 1;
                out.push(Statement::Open);
            } else if self.sign('}') {
                if depth == 0 {
                    return Ok(out);
                }
                depth -= 1;
                out.push(Statement::Close);
            } else if self.sign(';') {
            } else {
                self.statement(&mut out)?;
            }
        }
    }

    fn statement(&mut self, out: &mut Vec<Statement>) -> Res<()> {
        match self.peek().cloned() {
            Some(Token::Dot(word)) => match word.as_str() {
                "loc" | "file" => self.skip_line(),
                "pragma" => while self.next()? != Token::Sign(';') {},
                _ => out.extend(self.variables()?.into_iter().map(Statement::Declare)),
            },
            Some(Token::Word(name)) if self.peek_at(1) == Some(&Token::Sign(':')) => {
                self.at += 2;
                if self.dot("branchtargets") || self.dot("calltargets") {
                    let mut labels = vec![self.word()?];
                    while self.sign(',') {
                        labels.push(self.word()?);
                    }
                    self.expect(';')?;
                    out.push(Statement::BranchTargets { name, labels });
                } else if self.dot("callprototype") {
                    while self.next()? != Token::Sign(';') {}
                } else {
                    out.push(Statement::Label(name));
                }
            }
            Some(_) => out.push(Statement::Instruction(self.instruction()?)),
            None => return self.fail("a body without its `}`"),
        }
        Ok(())
    }

    fn instruction(&mut self) -> Res<Instruction> {
        let line = self.line();
        let mut guard = None;
        if self.sign('@') {
            let negated = self.sign('!');
            guard = Some((self.word()?, negated));
        }
        let mut opcode = vec![self.word()?];
        while let Some(Lexed { token: Token::Dot(part), .. }) = self.tokens.get(self.at) {
            opcode.push(part.clone());
            self.at += 1;
        }
        let mut operands = vec![];
        while !self.sign(';') {
            operands.push(self.operand()?);
            if !self.sign(',') {
                self.expect(';')?;
                break;
            }
        }
        Ok(Instruction { guard, opcode, operands, line })
    }

    fn list(&mut self, end: char) -> Res<Vec<Operand>> {
        let mut out = vec![];
        while !self.sign(end) {
            out.push(self.operand()?);
            if !self.sign(',') {
                self.expect(end)?;
                break;
            }
        }
        Ok(out)
    }

    fn operand(&mut self) -> Res<Operand> {
        let first = match self.next()? {
            Token::Sign('{') => Operand::Vector(self.list('}')?),
            Token::Sign('(') => Operand::List(self.list(')')?),
            Token::Sign('!') => Operand::Not(self.word()?),
            Token::Sign('[') => self.address()?,
            Token::Sign('-') => match self.next()? {
                Token::Int(v) => Operand::Int(-v),
                Token::F32(bits) => Operand::F32(bits ^ 1 << 31),
                Token::F64(bits) => Operand::F64(bits ^ 1 << 63),
                other => return self.fail(format!("unexpected {other:?} after `-`")),
            },
            Token::Sign('~') => Operand::Int(!self.int()?),
            Token::Int(v) => Operand::Int(v),
            Token::F32(bits) => Operand::F32(bits),
            Token::F64(bits) => Operand::F64(bits),
            Token::Word(word) => self.named(word)?,
            other => {
                self.at -= 1;
                return self.fail(format!("unexpected {other:?} in an operand"));
            }
        };
        if self.sign('|') {
            let second = self.operand()?;
            return Ok(Operand::Pair(first.into(), second.into()));
        }
        Ok(first)
    }

    fn named(&mut self, mut word: String) -> Res<Operand> {
        if word == "WARP_SZ" {
            return Ok(Operand::Int(32));
        }
        while let Some(Lexed { token: Token::Dot(part), glued: true, .. }) = self.tokens.get(self.at) {
            word = format!("{word}.{part}");
            self.at += 1;
        }
        let offset = self.signed_tail()?;
        Ok(if offset != 0 { Operand::NameOffset(word, offset) } else { Operand::Name(word) })
    }

    fn address(&mut self) -> Res<Operand> {
        let (base, offset) = match self.operand()? {
            Operand::NameOffset(name, offset) => (Operand::Name(name), offset),
            Operand::Int(v) => (Operand::Int(v), self.signed_tail()?),
            other => (other, 0),
        };
        let extra = if self.sign(',') {
            self.list(']')?
        } else {
            self.expect(']')?;
            vec![]
        };
        Ok(Operand::Address { base: base.into(), offset, extra })
    }
}
